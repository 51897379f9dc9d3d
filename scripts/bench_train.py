"""Times an optimizer step of gpt-train beside nanoGPT's, on the same recipe, in turns.

    python scripts/bench_train.py --text tinyshakespeare.txt --nanogpt DIR

DIR is a checkout of nanoGPT (github.com/karpathy/nanoGPT). Each turn is a fresh process that takes
some warm-up steps and then times single steps, as each program's own loop takes them: batch,
forward, backward, clip, update. Prints the median over all turns, and the ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "shakespeare-nanogpt-cpu.yaml"
WARMUP, TIMED = 10, 60


def timed(step: Callable[[int], None]) -> list[float]:
    """Seconds of each step after the warm-up."""
    for number in range(WARMUP):
        step(number)
    seconds = []
    for number in range(WARMUP, WARMUP + TIMED):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    return seconds


def our_steps(text: Path, folder: Path) -> list[float]:
    from gpt.build import build_training
    from gpt.configfile import load_config
    from gpt.data import Batches, open_data
    from gpt.device import keep_freed_memory, set_threads
    from gpt.gauges import Gauge
    from gpt.step import train_step

    config = load_config(CONFIG, [("data.source", str(text)), ("data.dir", str(folder))])
    set_threads()
    keep_freed_memory()
    data = open_data(config)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 0)
    gauge = Gauge(training.model, training.optimizer)

    def step(number: int) -> None:
        every = config.log.every_steps
        gauge.watch(full=number % every == 0, first=(number + 1) % every == 0)
        train_step(training, *batches.batch(number), gauge=gauge)

    return timed(step)


def nanogpt_steps(text: Path, checkout: Path) -> list[float]:
    sys.path.insert(0, str(checkout))
    import numpy as np
    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    characters = text.read_text(encoding="utf-8")
    index = {character: number for number, character in enumerate(sorted(set(characters)))}
    train = characters[: len(characters) * 9 // 10]
    ids = np.array([index[character] for character in train], dtype=np.uint16)
    shape = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
    model = GPT(GPTConfig(vocab_size=len(index), dropout=0.0, bias=False, **shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def windows(starts: torch.Tensor, shift: int) -> torch.Tensor:
        rows = [ids[start + shift : start + shift + 64].astype(np.int64) for start in starts]
        return torch.stack([torch.from_numpy(row) for row in rows])

    def step(number: int) -> None:
        starts = torch.randint(len(ids) - 64, (12,))
        _, loss = model(windows(starts, 0), windows(starts, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="DIR")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", choices=("ours", "nanogpt"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "ours":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(our_steps(arguments.text, Path(folder))))
        return
    if arguments.worker == "nanogpt":
        print(json.dumps(nanogpt_steps(arguments.text, arguments.nanogpt)))
        return
    seconds: dict[str, list[float]] = {"ours": [], "nanogpt": []}
    for turn in range(arguments.turns):
        for name, steps in seconds.items():
            command = [sys.executable, *sys.argv, "--worker", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured = json.loads(output.splitlines()[-1])
            steps += measured
            print(f"turn {turn + 1}  {name:8} {statistics.median(measured) * 1e3:6.1f} ms/step")
    ours, theirs = (statistics.median(steps) * 1e3 for steps in seconds.values())
    print(f"median  ours {ours:.1f} ms, nanoGPT {theirs:.1f} ms: {theirs / ours:.2f}x as fast")


if __name__ == "__main__":
    main()
