"""What saving, verifying and loading a checkpoint costs: `python -m scripts.bench_checkpoint`.

The model is GPT-2's size unless `--n-layer` and `--n-embd` say otherwise; AdamW's state is full.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpt.checkpoint import Training, restore_checkpoint, save_checkpoint, verify_checkpoint
from gpt.checkpoint import _write_files as write_files
from gpt.config import Config
from gpt.files import sync
from gpt.model import GPT, count_parameters
from gpt.optim import build_optimizer
from gpt.plan import Plan
from gpt.schedule import build_scheduler
from gpt.shards import hash_file
from gpt.tokenizer import build_tokenizer

VOCAB_SIZE = 50257
STEP_S = 3.0  # of this model, 1,024 tokens, on two cores
GIGABYTE = 10**9


def build(n_layer: int, n_embd: int) -> Training:
    """A training whose optimizer has made a step, of zeros: the same bytes as any other."""
    config = Config.model_validate(
        {
            "tokenizer": {"kind": "bytes"},
            "model": {"n_layer": n_layer, "n_head": n_embd // 64, "n_embd": n_embd}
            | {"tie_embeddings": True, "context_len": 1024},
        }
    )
    tokenizer = build_tokenizer(config.tokenizer, tuple)
    model = GPT(config.model, VOCAB_SIZE)
    optimizer = build_optimizer(model, config.optimizer, device=torch.device("cpu"))
    scheduler = build_scheduler(optimizer, Plan.from_config(config, config.train.max_steps or 1))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Training(config, tokenizer, model, optimizer, scheduler, scaler, torch.float32, "")


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parts(training: Training, folder: Path) -> dict[str, float]:
    """Seconds of each part of a save, one after the other."""
    folder.mkdir(parents=True)
    seconds = {"write the files": timed(lambda: write_files(folder, training))}
    paths = sorted(folder.iterdir())
    seconds["make them durable (fsync)"] = timed(lambda: [sync(path) for path in paths])
    seconds["SHA-256 of each"] = timed(lambda: [hash_file(path) for path in paths])
    shutil.rmtree(folder)
    return seconds


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_checkpoint", description=__doc__)
    parser.add_argument("--dir", type=Path, help="a folder on the disk in question (default: /tmp)")
    parser.add_argument("--n-layer", type=int, default=12)
    parser.add_argument("--n-embd", type=int, default=768)
    parser.add_argument("--every-steps", type=int, default=250, help="between saves (default: 250)")
    parser.add_argument("--step-s", type=float, default=STEP_S, help="seconds a step takes")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    training = build(arguments.n_layer, arguments.n_embd)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name) / "step-00000000"
        rows = [parts(training, Path(name) / "parts") for _ in range(arguments.repeats)]
        saves = [timed(lambda: save_checkpoint(folder, training)) for _ in range(arguments.repeats)]
        verifies = [timed(lambda: verify_checkpoint(folder)) for _ in range(arguments.repeats)]
        loads = [timed(lambda: restore_checkpoint(folder, training)) for _ in range(2)]
        size = sum(path.stat().st_size for path in folder.iterdir())
        shards = Path(name) / "shards"
        shards.write_bytes(bytes(GIGABYTE))
        hashing = [timed(lambda: hash_file(shards)) for _ in range(arguments.repeats)]
    print(f"{count_parameters(training.model):,} parameters, {size / 1e9:.2f} GB a checkpoint")
    print("| part | best s | worst s |\n| --- | --- | --- |")
    for part in rows[0]:
        print(f"| {part} | {_both([row[part] for row in rows])} |")
    print(f"| a save: written, then hashed and synced side by side | {_both(saves)} |")
    print(f"| verifying before a resume or inference | {_both(verifies)} |")
    print(f"| loading it into a training | {_both(loads)} |")
    print(f"| SHA-256 of 1 GB of shards, at each opening of the text | {_both(hashing)} |")
    share = max(saves) / (max(saves) + arguments.every_steps * arguments.step_s)
    print(
        f"the slowest save is {share:.2%} of the time, every {arguments.every_steps} steps of "
        f"{arguments.step_s:g} s"
    )
    return 0


def _both(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} | {max(seconds):.2f}"


if __name__ == "__main__":
    sys.exit(main())
