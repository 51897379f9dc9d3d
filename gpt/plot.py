"""Draws a run from its metrics.jsonl: loss and learning rate over the optimizer steps.

`python -m gpt.plot RUN [PNG]` does it from a shell. Judging the curves is not done here.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gpt.errors import UserError, run_command, say
from gpt.files import write_durably
from gpt.metrics import Record, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette, which stays apart for the colour-blind and in grey.
TRAIN, VAL, RATE, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#333333", "#DDDDDD"
HIGHEST = 1e9  # times the typical value
Curve = tuple[list[int], list[float]]


def plot_run(run_dir: Path, png: Path) -> None:
    """Draws the run's loss (nats per token, and bits per byte) and rate into a PNG file.

    Raises UserError if the run has no steps to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    train, val = curve(records, "train", "loss"), curve(records, "eval", "val_loss")
    rate = curve(records, "train", "lr")
    if not train[0]:
        raise UserError(f"{run_dir}: no training steps in metrics.jsonl; is it a run directory?")
    figure = Figure(figsize=(9, 5.6), dpi=150)
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bits_per_nat = _bits_per_nat(records)
    _draw_loss(upper, train, val, bits_per_nat)
    lower.plot(*rate, color=RATE, linewidth=1.8)
    lower.set_ylim(bottom=0, top=1.1 * max(rate[1], default=1.0) or 1.0)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.yaxis.set_major_formatter("{x:g}")  # plain: powers of ten as formulas take 0.2 s
    lower.set_xlim(0, max(train[0][-1], *val[0], 1))
    for axes in (upper, lower):
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    figure.align_ylabels([upper, lower])
    figure.suptitle(_title(run_dir.resolve().name, records, train, val), fontsize=12, color=INK)
    # Margins that are known, and `print_png` below: matplotlib's own layout measures every text
    # first, and `savefig` draws everything twice, while at a run's end somebody waits.
    right = 0.925 if bits_per_nat is not None else 0.98
    figure.subplots_adjust(left=0.105, right=right, bottom=0.09, top=0.93, hspace=0.13)
    png.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    canvas.print_png(drawn)  # type: ignore[no-untyped-call]
    write_durably(png, drawn.getvalue())


def curve(records: Sequence[Record], kind: str, key: str) -> Curve:
    """Steps and finite values of one field."""
    points = [
        (int(record["step"]), float(record[key]))
        for record in records
        if record.get("kind") == kind
        and isinstance(record.get("step"), int)
        and isinstance(record.get(key), int | float)
        and math.isfinite(record[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def smooth(steps: Sequence[int], values: Sequence[float]) -> list[float]:
    """A moving average centred on each point, narrower at the ends and where the loss falls fast.

    Its window grows with the step, so that the first fall is not washed out, and it never looks
    further to one side than to the other, so that it does not lag.
    """
    # A sum of what is far larger than the rest would lose the rest.
    most = HIGHEST * median(map(abs, values)) if len(values) else 0.0
    total = [0.0]
    for value in values:
        total.append(total[-1] + (max(-most, min(value, most)) if most else value))
    smoothed = []
    for index in range(len(steps)):
        half = min(index // 8, len(values) - 1 - index, max(1, len(values) // 40))
        low, high = index - half, index + half + 1
        smoothed.append((total[high] - total[low]) / (high - low))
    return smoothed


def _bits_per_nat(records: Sequence[Record]) -> float | None:
    """Bits per byte for each nat per token: a property of the text and the tokenizer."""
    losses, bits = curve(records, "eval", "val_loss"), curve(records, "eval", "val_bpb")
    by_step = dict(zip(*losses, strict=True))
    ratios = [bit / by_step[step] for step, bit in zip(*bits, strict=True) if by_step.get(step)]
    return ratios[-1] if ratios and ratios[-1] > 0 else None


def _draw_loss(axes: "Axes", train: Curve, val: Curve, bits_per_nat: float | None) -> None:
    axes.plot(*train, color=TRAIN, alpha=0.25, linewidth=0.9, label="train, each logged step")
    axes.plot(train[0], smooth(*train), color=TRAIN, linewidth=1.8, label="train, smoothed")
    if val[0]:
        marker = "o" if len(val[0]) <= 60 else None
        axes.plot(
            *val,
            color=VAL,
            linewidth=1.4,
            linestyle="--",
            marker=marker,
            markersize=4.5,
            clip_on=False,
            zorder=3,
            label="validation",
        )
    # One early outlier must not flatten the rest: the top is where the run began, or was typical.
    seen = sorted([*train[1], *val[1]])
    typical = seen[int(0.99 * (len(seen) - 1))]
    top, low = max(typical, train[1][0]), seen[0]
    margin = 0.05 * (top - low) or 0.1
    axes.set_ylim(low - margin, top + margin)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=9, loc="upper right")
    if bits_per_nat is not None:
        to_bits, to_nats = partial(_scaled, bits_per_nat), partial(_scaled, 1 / bits_per_nat)
        right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
        right.set_ylabel("bits per byte")
        right.tick_params(colors=INK, labelsize=9)
        right.spines["right"].set_visible(False)


def _scaled(factor: float, values: Any) -> Any:  # noqa: ANN401 (matplotlib's own array type)
    return values * factor


def _title(name: str, records: Sequence[Record], train: Curve, val: Curve) -> str:
    last = train[1][-max(1, len(train[1]) // 40) :]
    parts = [f"{name}: step {train[0][-1]:,}", f"train loss {sum(last) / len(last):.3f}"]
    if val[0]:
        parts.append(f"validation loss {val[1][-1]:.3f}")
    bits = curve(records, "eval", "val_bpb")[1]
    if bits:
        parts.append(f"{bits[-1]:.3f} bits per byte")
    return ", ".join(parts)


def _command(argv: Sequence[str]) -> None:
    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise UserError("usage: python -m gpt.plot RUN [PNG]")
    run_dir = Path(argv[0])
    png = Path(argv[1]) if len(argv) > 1 else run_dir / "loss.png"
    plot_run(run_dir, png)
    say(str(png))


if __name__ == "__main__":
    sys.exit(run_command(_command))
