"""Draws a sweep: the loss of every run over its steps, and where each ended against its rate."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.lr.labels import Label, Rate, Verdict
from gpt.lr.rates import rate_text
from gpt.plot import FAINT, INK, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS: dict[Label, str] = {
    "too_small": "too small",
    "right": "right",
    "too_large": "too large",
    "diverged": "diverged",
}
# Okabe & Ito's palette: blue, green and vermilion stay apart for the colour-blind.
COLORS: dict[Label, str] = {
    "too_small": "#0072B2",
    "right": "#009E73",
    "too_large": "#D55E00",
    "diverged": "#777777",
}


def plot_sweep(verdict: Verdict, name: str, png: Path) -> None:
    """Draws all runs of `verdict` into a PNG file; `name` is the title's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    low, high = _loss_range(verdict.rates)
    _draw_curves(left, verdict.rates)
    _draw_ends(right, verdict, high)
    for axes in (left, right):
        axes.set_ylim(low, high)
        axes.set_ylabel("loss (nats per token)")
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    best = f": the best rate is {rate_text(verdict.best)}" if verdict.best is not None else ""
    figure.suptitle(f"{name}{best}", fontsize=12, color=INK)
    figure.savefig(png)


def _loss_range(rates: Sequence[Rate]) -> tuple[float, float]:
    """From the lowest loss to a little above the first one; what exploded leaves at the top."""
    runs = [run for rate in rates for run in rate.runs]
    seen = [loss for run in runs for loss in [*smooth(*run.train), *run.val[1]]]
    starts = [run.start for run in runs if math.isfinite(run.start)]
    low, top = min(seen, default=0.0), max(starts, default=1.0)
    ends = [run.val_loss for run in runs if run.val_loss is not None and run.val_loss < 1.5 * top]
    top = max([top, *ends])
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + 2 * margin


def _shades(rates: Sequence[Rate]) -> dict[float, tuple[float, ...]]:
    """A colour for each rate, from violet for the lowest to yellow for the highest."""
    from matplotlib import colormaps

    shades = colormaps["plasma"]
    return {
        rate.lr: tuple(shades(0.9 * place / max(1, len(rates) - 1)))
        for place, rate in enumerate(rates)
    }


def _draw_curves(axes: "Axes", rates: Sequence[Rate]) -> None:
    """Smoothed training losses; a cross where a run broke."""
    shades = _shades(rates)
    for rate in rates:
        for number, run in enumerate(rate.runs):
            steps, smoothed = run.train[0], smooth(*run.train)
            axes.plot(
                steps,
                smoothed,
                color=shades[rate.lr],
                linewidth=1.6 if rate.label == "right" else 1.1,
                label=f"{rate_text(rate.lr)}  {WORDS[rate.label]}" if number == 0 else None,
            )
            if run.broke and steps:
                axes.plot(steps[-1], smoothed[-1], "x", color=shades[rate.lr], markersize=8)
    axes.set_xlabel("optimizer step")
    axes.set_title("training loss, smoothed", fontsize=10, color=INK)
    # Beside the curves: those of slow rates run where the legend would be.
    axes.legend(
        edgecolor="none", fontsize=9, title="rate", loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )


def _draw_ends(axes: "Axes", verdict: Verdict, top: float) -> None:
    """Final validation loss of each run against its rate; lost ones as crosses at the top."""
    axes.set_xscale("log")
    sound = [rate for rate in verdict.rates if not rate.diverged]
    axes.plot(
        [rate.lr for rate in sound], [rate.mean for rate in sound], color=INK, linewidth=1, zorder=1
    )
    shown = set()
    for rate in verdict.rates:
        for run in rate.runs:
            label = verdict.label_of(run)
            height = top if run.val_loss is None else min(top, run.val_loss)
            is_off = height == top
            axes.plot(
                run.lr,
                height,
                "x" if label == "diverged" else "^" if is_off else "o",
                color=COLORS[label],
                markersize=8 if is_off else 6,
                clip_on=False,
                label=WORDS[label] if label not in shown else None,
            )
            shown.add(label)
    if right := [rate.lr for rate in verdict.rates if rate.label == "right"]:
        gap = _half_gap([rate.lr for rate in verdict.rates])
        axes.axvspan(min(right) / gap, max(right) * gap, color=COLORS["right"], alpha=0.12, lw=0)
    axes.set_xlabel("peak learning rate")
    axes.set_title("validation loss at the end", fontsize=10, color=INK)
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=9, loc="best")


def _half_gap(lrs: Sequence[float]) -> float:
    """The factor that reaches half-way to the next rate where the grid is finest."""
    gaps = [high / low for low, high in itertools.pairwise(lrs)]
    return math.sqrt(min(gaps, default=2.0))
