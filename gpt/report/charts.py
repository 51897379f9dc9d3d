"""The charts of one run: what there is data for, in the order in which it is read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from gpt.health.finding import Finding
from gpt.history import Column, History, Table, finite
from gpt.plot import RATE, TRAIN, VAL, smooth
from gpt.report.figures import (
    Chart,
    Line,
    line_figure,
    map_figure,
    mark_steps,
    style,
)
from gpt.report.marks import Mark, mark_trace, place_marks

MOST_BLOCKS = 8
LONG = 300
MOST_ROWS = 200
MOST_COLUMNS = 120


def run_charts(history: History, findings: Sequence[Finding]) -> list[Chart]:
    """Every chart that the log has data for, with the findings' marks."""
    marks = place_marks(findings, history.last_step)
    charts = [*_loss(history, findings, marks), *_rates(history)]
    charts += [*_gradient(history), *_update(history), *_maps(history), *_insides(history)]
    charts += _machine(history)
    for chart in charts:
        mark_steps(chart.figure, [(mark.label, mark.step) for mark in marks])
    return charts


def _loss(history: History, findings: Sequence[Finding], marks: Sequence[Mark]) -> Iterator[Chart]:
    steps, losses = finite(history.train["step"], history.train["loss"])
    val_steps, vals = finite(history.evals["step"], history.evals["val_loss"])
    if not len(steps) and not len(val_steps):
        return
    lines = []
    if len(steps):
        smoothed = np.array(smooth([int(step) for step in steps], losses.tolist()))
        lines += [
            Line("train, each logged step", steps, losses, TRAIN, width=1, faint=True),
            Line("train, smoothed", steps, smoothed, TRAIN, width=2.2),
        ]
    if len(val_steps):
        pointed = len(val_steps) <= 60
        lines.append(Line("validation", val_steps, vals, VAL, "dash", markers=pointed))
    figure = line_figure(
        lines, "loss (nats per token)", y_range=loss_range(losses, vals), height=420
    )
    if marks:
        figure["data"].append(mark_trace(history, findings, marks))
    outside = _outside(figure["layout"]["yaxis"]["range"], losses, vals)
    ends = [
        f"{line.label} from {line.values[0]:.4g} at step {line.steps[0]:,.0f} to "
        f"{line.values[-1]:.4g} at step {line.steps[-1]:,.0f}"
        for line in lines
        if not line.faint
    ]
    yield Chart(
        id="loss",
        title="Loss",
        about="What the model does not know yet, in nats per token: lower is better." + outside,
        figure=figure,
        summary="; ".join(ends),
        switches=("y", "x"),
        wide=True,
    )


def loss_range(*series: Column) -> tuple[float, float] | None:
    """Ends of a loss axis: one early outlier must not flatten the rest."""
    seen = np.sort(np.concatenate([values[np.isfinite(values)] for values in series]))
    if not len(seen):
        return None
    typical = float(seen[int(0.99 * (len(seen) - 1))])
    first = [float(values[0]) for values in series if len(values)]
    # A first loss that is itself an outlier is no measure of the rest.
    top = max(typical, min(first[0], 2 * typical))
    low = float(seen[0])
    margin = 0.05 * (top - low) or 0.1
    return low - margin, top + margin


def _outside(ends: Sequence[float], *series: Column) -> str:
    above = sum(int((values > ends[1]).sum()) for values in series)
    if not above:
        return ""
    values = "1 value lies" if above == 1 else f"{above:,} values lie"
    return f" {values} above the frame; a double click shows all."


def _rates(history: History) -> Iterator[Chart]:
    train = history.train
    groups = train.named("lrs")
    lines = _lines(train, {f"lrs/{name}": name for name in groups})
    same = all(np.array_equal(line.values, lines[0].values) for line in lines)
    if len(lines) < 2 or same:
        lines = _lines(train, {"lr": "rate"}) or lines[:1]
    if len(lines) == 1:
        lines = [replace(lines[0], color=RATE)]
    if lines:
        figure = line_figure(lines, "learning rate")
        figure["layout"]["yaxis"] |= {"rangemode": "tozero", "exponentformat": "power"}
        about = "The learning rate that each step used"
        about += " in each of the optimizer's groups." if len(lines) > 1 else "."
        yield Chart("rate", "Learning rate", about, figure, _spans(lines), ("y",))


def _gradient(history: History) -> Iterator[Chart]:
    lines = _lines(
        history.train,
        {"grad_norm": "each logged step", "grad_norm_max": "largest since the one before"},
    )
    if not lines:
        return
    clip = history.config.train.grad_clip if history.config else None
    limits = [(f"clipped above {clip:g}", clip)] if clip else []
    figure = line_figure(lines, "norm of the gradient", log_y=True, limits=limits)
    about = "Length of the gradient before clipping."
    yield Chart("gradient", "Gradient norm", about, figure, _spans(lines), ("y",))


def _update(history: History) -> Iterator[Chart]:
    train = history.train
    yield from _simple(
        train,
        "update",
        "Update ratio",
        "How far one step moves the weights, as a share of their length.",
        "update / weights",
        {"update_ratio": "all weights"},
        log_y=True,
    )
    yield from _simple(
        train,
        "slope",
        "Slope along the update",
        "How the loss changed along the last update where it began and where it ended, on another "
        "batch. Above 0 at its end, the step went too far.",
        "slope (nats)",
        {"slope_before": "where it began", "slope_after": "where it ended"},
    )
    yield from _simple(
        train,
        "adam",
        "Adam's RMS",
        "How large gradients are beside what Adam expects of them: about 1, or below. Far above 1 "
        "its second moment lags behind, and steps are too long.",
        "root of the mean of g² / v",
        {"adam_rms": "all weights that Adam updates"},
    )
    tokens = history.config.tokens_per_step if history.config else None
    limits = [(f"one step: {tokens:,}", float(tokens))] if tokens else []
    lines = _lines(train, {"noise_scale": "noise scale"})
    if lines:
        figure = line_figure(lines, "tokens", log_y=True, limits=limits)
        about = (
            "The batch, in tokens, at which noise and signal of the gradient are alike: far larger "
            "batches waste work, far smaller ones are noisy."
        )
        yield Chart("noise", "Gradient noise scale", about, figure, _spans(lines), ("y",))


def _maps(history: History) -> Iterator[Chart]:
    rows = np.arange(len(history.layers))
    if len(rows) > MOST_COLUMNS:
        rows = np.unique(np.linspace(0, len(rows) - 1, MOST_COLUMNS).astype(int))
    for column, title, about, unit in (
        (
            "update_ratio",
            "Update ratio by layer",
            "How far one step moves each parameter, as a share of its length; lighter is further.",
            "update / weights",
        ),
        (
            "grad_norm",
            "Gradient norm by layer",
            "Length of each parameter's gradient; lighter is longer.",
            "gradient norm",
        ),
    ):
        found = {
            name: np.where(values[rows] > 0, values[rows], np.nan)
            for name, values in history.layers.named(column).items()
        }
        found = {name: values for name, values in found.items() if np.isfinite(values).any()}
        if found:
            identifier, steps = f"{column.replace('_', '-')}-map", history.layers["step"][rows]
            yield _map(steps, identifier, title, about, unit, found)


def _map(
    steps: Column, identifier: str, title: str, about: str, unit: str, found: dict[str, Column]
) -> Chart:
    names = list(found)
    if len(names) > MOST_ROWS:
        kept = np.unique(np.linspace(0, len(names) - 1, MOST_ROWS).astype(int))
        names = [names[index] for index in kept]
        about += f" Of {len(found):,} parameters {len(names):,} are shown."
    values = [found[name] for name in names]
    figure = map_figure([_short(name) for name in names], steps, values, unit)
    last = {name: float(row[np.isfinite(row)][-1]) for name, row in zip(names, values, strict=True)}
    most, least = max(last, key=lambda n: last[n]), min(last, key=lambda n: last[n])
    summary = (
        f"at the end from {last[least]:.3g} ({_short(least)}) to {last[most]:.3g} ({_short(most)})"
    )
    return Chart(identifier, title, about, figure, summary, wide=len(names) > 30)


def _short(name: str) -> str:
    return name.removesuffix(".weight").removeprefix("blocks.")


def _insides(history: History) -> Iterator[Chart]:
    for column, title, about, unit, log_y in (
        (
            "attn_logit_max",
            "Attention logits",
            "The largest logit of attention in each block; one that grows without end makes "
            "attention look at a single token.",
            "largest logit",
            True,
        ),
        (
            "rms",
            "Activations",
            "How large the stream behind each block is.",
            "root mean square",
            True,
        ),
        (
            "dead_share",
            "Dead features",
            "Share of the MLP's features that are 0 at every token of a sequence.",
            "share of features",
            False,
        ),
    ):
        blocks = history.layers.named(column)
        names = list(blocks)
        if len(names) > MOST_BLOCKS:
            kept = np.unique(np.linspace(0, len(names) - 1, MOST_BLOCKS).astype(int))
            about += f" Of {len(names)} blocks {len(kept)} are shown."
            names = [names[index] for index in kept]
        lines = _lines(
            history.layers,
            {f"{column}/{name}": f"block {_short(name)}" for name in names},
            positive=log_y,
        )
        if lines:
            figure = line_figure(lines, unit, log_y=log_y)
            name = column.replace("_", "-")
            switches = ("y",) if log_y else ()
            yield Chart(name, title, about, figure, _spans(lines), switches)


def _machine(history: History) -> Iterator[Chart]:
    train = history.train
    yield from _simple(
        train,
        "speed",
        "Throughput",
        "Tokens a second between two logged steps.",
        "tokens / s",
        {"tokens_per_s": "tokens / s"},
        to_zero=True,
    )
    memory = {"memory_bytes": "memory"}
    gigabytes = Table({"step": train["step"], "memory_bytes": train["memory_bytes"] / 1e9})
    about = "The most memory that was held until then."
    yield from _simple(gigabytes, "memory", "Memory", about, "GB", memory, to_zero=True)
    yield from _simple(
        train,
        "cpu",
        "Processor",
        "Share of its threads' time that the run computed, and of the machine that others took.",
        "share",
        {"cpu_share": "this run", "others_share": "other programs"},
        to_zero=True,
    )


def _simple(
    table: Table,
    identifier: str,
    title: str,
    about: str,
    unit: str,
    columns: dict[str, str],
    *,
    log_y: bool = False,
    to_zero: bool = False,
) -> Iterator[Chart]:
    """A chart of some columns by their labels; nothing where none was measured."""
    lines = _lines(table, columns, positive=log_y)
    if not lines:
        return
    figure = line_figure(lines, unit, log_y=log_y)
    if to_zero:
        figure["layout"]["yaxis"]["rangemode"] = "tozero"
    switches = ("y",) if log_y else ()
    yield Chart(identifier, title, about, figure, _spans(lines), switches)


def _lines(table: Table, columns: dict[str, str], *, positive: bool = False) -> list[Line]:
    """Lines of the columns that hold any finite (and positive) number.

    Of a long and rough series the line is smoothed, and the single values stand faint behind it.
    """
    lines: list[Line] = []
    behind: list[Line] = []
    for column, label in columns.items():
        steps, values = finite(table["step"], table[column])
        if positive:
            steps, values = steps[values > 0], values[values > 0]
        if not len(steps):
            continue
        color, dash = style(len(lines))
        if _is_rough(values):
            behind.append(Line("", steps, values, color, width=1, faint=True))
            values = np.array(smooth([int(step) for step in steps], values.tolist()))
            label += ", smoothed"
        lines.append(Line(label, steps, values, color, dash))
    return [*behind, *lines]


def _is_rough(values: Column) -> bool:
    """Whether a line through all values would be a band."""
    spread = float(values.std())
    return len(values) >= LONG and bool(np.diff(values).std() > 0.3 * spread > 0)


def _spans(lines: Sequence[Line]) -> str:
    """First, last, lowest and highest of each line, in words."""
    return "; ".join(
        f"{line.label}: {line.values[0]:.3g} at step {line.steps[0]:,.0f}, "
        f"{line.values[-1]:.3g} at step {line.steps[-1]:,.0f}, "
        f"between {line.values.min():.3g} and {line.values.max():.3g}"
        for line in lines
        if line.label
    )
