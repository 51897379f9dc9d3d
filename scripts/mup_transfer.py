"""Does the best rate of a narrow model hold for a wide one? With muP and without, measured.

    python scripts/mup_transfer.py --out docs/mup-transfer

Trains two-layer GPT-2s of several widths on Python's own library, byte by byte, for some hundred
steps of AdamW, and looks for the best rate of each width: a grid of x2, widened until its best is
inside, then x sqrt(2) around that. At the base width both ways are the same model, to the bit, and
are run once. Each finished run is a line of OUT.jsonl: a script that was stopped goes on where it
stopped. The table goes to stdout and, with the settings, into OUT.md.

GPT-2's architecture, since it feels a wrong rate most: with this project's own defaults (q and k
normalised, residual outputs that start at 0) the loss of the narrow model stays within 1 % over a
factor of 4 in the rate.
"""

import argparse
import datetime
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

STEPS, BATCH, CONTEXT, BASE_WIDTH, HEAD = 300, 16, 32, 64, 32
COARSE = (-10.0, -9.0, -8.0, -7.0)  # log2 of the rates to begin with
SEEDS = (1, 2)
DIVERGED = 1e9
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": "true",
    "tie_embeddings": "true",
    "qk_norm": "false",
    "init": "gpt2",
}


def settings(width: int, exponent: float, seed: int, *, mup: bool, data: str) -> list[Any]:
    """One run as overrides of the default config."""
    base = str(BASE_WIDTH) if mup else "null"
    return [
        ("run.seed", str(seed)),
        ("data.dir", data),
        ("tokenizer.kind", "bytes"),
        ("model.n_layer", "2"),
        ("model.n_head", str(width // HEAD)),
        ("model.n_embd", str(width)),
        ("model.context_len", str(CONTEXT)),
        ("model.mup_base_width", base),
        *((f"model.{key}", value) for key, value in GPT2.items()),
        ("optimizer.lr", repr(2.0**exponent)),
        ("schedule.warmup_steps", str(STEPS // 10)),
        ("schedule.min_lr", "0"),
        ("train.max_steps", str(STEPS)),
        ("train.batch_size", str(BATCH)),
        ("train.dtype", "fp32"),
        ("train.compile", "off"),
        ("eval.max_tokens", "16384"),
    ]


def train_once(overrides: list[Any]) -> float:
    """Validation loss after the whole run; DIVERGED if its numbers broke."""
    from gpt.build import build_training
    from gpt.configfile import load_config
    from gpt.data import Batches, open_data
    from gpt.step import NonFiniteError, evaluate, train_step

    config = load_config(None, overrides)
    data = open_data(config)
    training, _ = build_training(config, data)
    train = config.train
    batches = Batches(data.train, config.model.context_len, train.batch_size, config.run.seed)
    try:
        for step in range(train.max_steps or 0):
            train_step(training, *batches.batch(step))
    except NonFiniteError:
        return DIVERGED
    device = next(training.model.parameters()).device
    result = evaluate(training, data.val, device, lambda: False)
    assert result is not None
    return result.loss if math.isfinite(result.loss) else DIVERGED


class Runs:
    """The finished runs by what they were, and the file that they are kept in."""

    def __init__(self, path: Path, data: str, seeds: int) -> None:
        """Reads what earlier calls have finished."""
        self.path, self.data, self.seeds = path, data, SEEDS[:seeds]
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.losses = {self._key(row): row["loss"] for row in map(json.loads, lines)}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["width"], row["mup"], row["log2_lr"], row["seed"]

    def loss(self, width: int, exponent: float, *, mup: bool) -> float:
        """Mean validation loss over the seeds; trains what has not been trained yet."""
        mup = mup and width != BASE_WIDTH  # there the same to the bit, by test
        found = []
        for seed in self.seeds:
            row = {"width": width, "mup": mup, "log2_lr": exponent, "seed": seed}
            if self._key(row) not in self.losses:
                start = time.process_time()
                overrides = settings(width, exponent, seed, mup=mup, data=self.data)
                row["loss"] = train_once(overrides)
                row["cpu_s"] = round(time.process_time() - start, 1)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                self.losses[self._key(row)] = row["loss"]
            found.append(self.losses[self._key(row)])
        return statistics.fmean(found)

    def search(self, width: int, *, mup: bool) -> dict[float, float]:
        """Losses by log2 of the rate, around and including the best one."""
        losses = {exponent: self.loss(width, exponent, mup=mup) for exponent in COARSE}
        while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
            outward = best - 1 if best == min(losses) else best + 1
            losses[outward] = self.loss(width, outward, mup=mup)
        for exponent in (best - 0.5, best + 0.5):
            losses[exponent] = self.loss(width, exponent, mup=mup)
        return losses


def table(runs: Runs, widths: list[int]) -> list[str]:
    """The best rate of each width, how far it moved, and what keeping the base's rate costs."""
    lines = [
        "| width | muP | best rate | moved from 64 wide | loss there | loss at the 64-wide rate |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    at_base = runs.search(BASE_WIDTH, mup=False)
    base = min(at_base, key=at_base.__getitem__)
    for width in widths:
        for mup in (False, True) if width != BASE_WIDTH else (False,):
            losses = runs.search(width, mup=mup)
            best = min(losses, key=losses.__getitem__)
            kept = runs.loss(width, base, mup=mup)
            cost = 100 * (kept / losses[best] - 1)
            label = "either" if width == BASE_WIDTH else "on" if mup else "off"
            lines.append(
                f"| {width} | {label} | {2**best:.2e} | x{2 ** (best - base):.2f} "
                f"| {losses[best]:.4f} | {kept:.4f} (+{cost:.1f} %) |"
            )
    return lines


def all_losses(runs: Runs) -> list[str]:
    """Every measured point, a row for each rate."""
    columns = sorted({(width, mup) for width, mup, _, _ in runs.losses})
    head = [f"{width}{' muP' if mup else ''}" for width, mup in columns]
    lines = [f"| rate | {' | '.join(head)} |", "| ---: |" + " ---: |" * len(head)]
    for exponent in sorted({key[2] for key in runs.losses}):
        cells = []
        for width, mup in columns:
            found = [runs.losses.get((width, mup, exponent, seed)) for seed in runs.seeds]
            whole = [loss for loss in found if loss is not None]
            mean = statistics.fmean(whole) if len(whole) == len(found) else None
            cells.append("" if mean is None else "diverged" if mean > 100 else f"{mean:.4f}")
        lines.append(f"| {2**exponent:.2e} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="STEM")
    parser.add_argument("--data", default="data", metavar="DIR", help="where the shards are kept")
    parser.add_argument(
        "--widths", default="64,128,256,512", help="multiples of 32, commas between"
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    arguments = parser.parse_args()
    widths = [int(width) for width in arguments.widths.split(",")]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.out.with_suffix(".jsonl"), arguments.data, arguments.seeds)
    command = (
        f"python scripts/mup_transfer.py --out {arguments.out} --widths {arguments.widths} "
        f"--seeds {arguments.seeds}"
    )
    result = table(runs, widths)
    print("\n".join(result))
    page = [
        "# The best rate at other widths, with muP and without",
        "",
        f"{datetime.date.today()}, `{command}`: "
        f"GPT-2 with two layers, heads of {HEAD}, context {CONTEXT}, bytes of Python's library, "
        f"AdamW, {STEPS} steps of {BATCH} sequences, cosine to 0, mean of {arguments.seeds} seeds; "
        "validation loss in nats a byte.",
        "",
        *result,
        "",
        "All measured losses:",
        "",
        *all_losses(runs),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
