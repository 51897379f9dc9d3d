"""Times whole training runs on tiny Shakespeare: from the command to the loss, start included.

    python scripts/bench_loss.py --text tinyshakespeare.txt --nanogpt ../nanoGPT

Each run is a process of its own with nothing prepared: reading and tokenizing the text, compiling
where that is done, training, and the evaluation over the whole last tenth are all in its time.
nanoGPT runs its README's recipe for a CPU, `prepare.py` included, in a copy of its folder; what it
reached is measured afterwards, over the same characters, and costs it no time. Who runs alternates
from seed to seed. Run it on an idle machine and quote ratios of one run.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
# nanoGPT's README, "I only have a macbook".
RECIPE = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]
# Runs in nanoGPT's folder: its loss in nats a character over the whole validation tail.
JUDGE = """
import json, numpy, sys, torch
from torch.nn import functional as F
from model import GPT, GPTConfig
saved = torch.load("out-bench/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", numpy.uint16).astype(int))
size, total = saved["model_args"]["block_size"], 0.0
with torch.no_grad():
    for at in range(0, len(ids) - 1, size):
        x, y = ids[at : at + size][: len(ids) - 1 - at], ids[at + 1 : at + 1 + size]
        logits, _ = model(x[None], y[None])
        total += float(F.cross_entropy(logits[0], y, reduction="sum"))
print(json.dumps(total / (len(ids) - 1)))
"""


@dataclass(frozen=True)
class Outcome:
    """One run: wall seconds of its process, and nats a character over the last tenth."""

    seconds: float
    loss: float


def main() -> None:
    options = parse()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seeds {options.seeds}")
    text = options.text.resolve()
    outcomes: dict[str, list[Outcome]] = {}
    with TemporaryDirectory(prefix="bench-loss-") as folder:
        for seed in options.seeds:
            if options.nanogpt is not None:
                place = Path(folder) / f"nanogpt-{seed}"
                note(outcomes, "nanoGPT", seed, nanogpt(options.nanogpt, text, seed, place))
            for config in options.configs:
                place = Path(folder) / f"{config.stem}-{seed}"
                note(outcomes, config.stem, seed, ours(config.resolve(), text, seed, place))
    print("\n| run | seconds, median | nats a character | seeds |\n| --- | --- | --- | --- |")
    for who, runs in outcomes.items():
        losses = ", ".join(f"{run.loss:.4f}" for run in runs)
        print(
            f"| {who} | {statistics.median(run.seconds for run in runs):.1f} | {losses} |", end=""
        )
        print(f" {', '.join(str(seed) for seed in options.seeds)} |")
    if options.nanogpt is not None:
        theirs = statistics.median(run.seconds for run in outcomes.pop("nanoGPT"))
        for who, runs in outcomes.items():
            print(f"{who}: {theirs / statistics.median(r.seconds for r in runs):.1f} times as fast")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="tiny Shakespeare, 1,115,394 bytes"
    )
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument(
        "--configs",
        type=Path,
        nargs="+",
        default=[ROOT / "configs" / "speed-shakespeare-cpu.yaml"],
    )
    return parser.parse_args()


def note(outcomes: dict[str, list[Outcome]], who: str, seed: int, outcome: Outcome) -> None:
    outcomes.setdefault(who, []).append(outcome)
    print(f"{who}, seed {seed}: {outcome.seconds:.1f} s, {outcome.loss:.4f} nats", flush=True)


def ours(config: Path, text: Path, seed: int, place: Path) -> Outcome:
    place.mkdir()
    command = [str(Path(sys.executable).with_name("gpt-train")), "--config", str(config)]
    command += ["--data.source", str(text), "--run.seed", str(seed), "--run.name", "bench"]
    seconds = run(command, place)
    lines = (place / "runs" / "bench" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [record for record in map(json.loads, lines) if record["kind"] == "eval"][-1]
    return Outcome(seconds, last["val_bpb"] * math.log(2))  # the text is ASCII: a byte a character


def nanogpt(source: Path, text: Path, seed: int, place: Path) -> Outcome:
    shutil.copytree(source, place, ignore=shutil.ignore_patterns(".git", "*.png", "*.ipynb"))
    shutil.copy(text, place / "data" / "shakespeare_char" / "input.txt")
    train = place / "train.py"
    code = train.read_text(encoding="utf-8")
    assert "torch.manual_seed(1337 + seed_offset)" in code, "nanoGPT seeds its runs in another way"
    seeded = code.replace("torch.manual_seed(1337 +", f"torch.manual_seed({seed} +")
    train.write_text(seeded, encoding="utf-8")
    seconds = run([sys.executable, "data/shakespeare_char/prepare.py"], place)
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE]
    seconds += run([*command, "--out_dir=out-bench", "--always_save_checkpoint=True"], place)
    judged = subprocess.run(
        [sys.executable, "-c", JUDGE], cwd=place, check=True, capture_output=True, text=True
    )
    return Outcome(seconds, json.loads(judged.stdout.splitlines()[-1]))


def run(command: list[str], place: Path) -> float:
    """Wall seconds of a command, from its start to its end."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
