"""Draws what the finder saw: the ramps, and the trials with the pick and its interval."""

from pathlib import Path
from typing import TYPE_CHECKING

from gpt.lr.find import Found
from gpt.plot import FAINT, INK, RATE, TRAIN, VAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = ("#56B4E9", "#0072B2", "#003C5E", "#001B2B")


def plot_found(found: Found, name: str, png: Path) -> None:
    """Draws both stages into a PNG file; `name` is the title's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_ramps(left, found)
    _draw_trials(right, found)
    for axes in (left, right):
        _log_rates(axes)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(edgecolor="none", framealpha=0.9, fontsize=9, loc="best")
    answer = "no answer" if found.lr is None else f"learning rate {found.lr:.2g}"
    figure.suptitle(f"{name}: {answer}", fontsize=12, color=INK)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def _log_rates(axes: "Axes") -> None:
    """A logarithmic axis of rates with as many numbers as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.2g}"))
    axes.set_xlabel("learning rate")


def _draw_ramps(axes: "Axes", found: Found) -> None:
    axes.set_title("bracket: one training while the rate rises", fontsize=10, color=INK)
    axes.set_ylabel("loss of the step (nats per token)")
    for index, ramp in enumerate(found.ramps):
        label = "loss, one line a seed" if index == 0 else None
        axes.plot(ramp.rates, ramp.losses, color=TRAIN, linewidth=1.3, alpha=0.8, label=label)
    starts = [ramp.losses[0] for ramp in found.ramps if ramp.losses]
    lows = [min(ramp.losses) for ramp in found.ramps if ramp.losses]
    if starts:
        fall = (max(starts) - min(lows)) or 1.0
        axes.set_ylim(min(lows) - 0.1 * fall, max(starts) + 0.3 * fall)
    bracket = found.bracket
    if bracket is not None:
        axes.axvspan(bracket.low, bracket.high, color=RATE, alpha=0.12, label="bracket")
        if bracket.broken is not None:
            axes.axvline(bracket.broken, color=VAL, linestyle=":", label="breaks away")


def _draw_trials(axes: "Axes", found: Found) -> None:
    axes.set_title("decide: short runs with the whole schedule", fontsize=10, color=INK)
    axes.set_ylabel("validation loss at the end (nats per token)")
    for index, (steps, trials) in enumerate(found.rounds):
        color = _SHADES[index % len(_SHADES)]
        rates = sorted({trial.lr for trial in trials})
        ends = {lr: [t.loss for t in trials if t.lr == lr] for lr in rates}
        sound = [lr for lr in rates if max(ends[lr]) < float("inf")]
        means = [sum(ends[lr]) / len(ends[lr]) for lr in sound]
        axes.plot(sound, means, color=color, linewidth=1.5, label=f"{steps} steps")
        for lr in sound:
            axes.plot([lr] * len(ends[lr]), ends[lr], "o", color=color, markersize=4)
        for lr in rates:
            if lr not in sound:
                axes.plot(lr, 0.97, "x", color=VAL, transform=axes.get_xaxis_transform())
    if found.lr is not None and found.interval is not None:
        axes.axvspan(*found.interval, color=RATE, alpha=0.15)
        label = f"{found.lr:.2g} for all {found.total_steps:,} steps"
        axes.axvline(found.lr, color=RATE, linewidth=2, label=label)
