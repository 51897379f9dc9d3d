"""The page about several runs: side by side, their curves, their differences with intervals."""

from collections.abc import Sequence

import numpy as np

from gpt.history import finite
from gpt.plot import smooth
from gpt.report import sections, words
from gpt.report.charts import loss_range
from gpt.report.compare import COVERS, Comparison, compare, differences
from gpt.report.config_keys import unique_names
from gpt.report.figures import Chart, Line, line_figure, style
from gpt.report.judged import Judged
from gpt.report.markup import Html, table, tag


def comparison_sections(
    runs: Sequence[Judged], charts: Sequence[Chart], notes: Sequence[str] = ()
) -> list[Html]:
    """The parts of the page."""
    comparison = compare([run.history for run in runs])
    rows: list[list[object]] = [list(row) for row in words.side_by_side(runs)]
    listed = table(list(words.COLUMNS), rows)
    return sections.joined(
        [
            sections.section("runs", "Side by side", listed),
            sections.section("differences", "Differences", *_differences(comparison)),
            sections.section("findings", "Findings", *_findings(runs, comparison.names)),
            _keys(comparison),
            sections.section("curves", "Curves", sections.charts(charts)) if charts else None,
            sections.section("notes", "Notes", *(tag("pre", n) for n in notes)) if notes else None,
        ]
    )


def _differences(comparison: Comparison) -> list[Html]:
    parts: list[Html] = []
    if comparison.seeds:
        parts.append(tag("h3", "Across seeds"))
        lines = [group.words() for group in comparison.seeds]
        lines += [gap.words() for gap in comparison.seed_gaps]
        parts.append(tag("ul", *(tag("li", line) for line in lines)))
    for pair in comparison.pairs:
        parts += [
            tag("h3", f"{pair.run} against {pair.against}"),
            tag("ul", *(tag("li", line) for line in pair.words())),
        ]
    if comparison.pairs:
        parts.append(tag("p", f"Intervals of two runs cover {COVERS}.", class_="dim"))
    parts += [tag("p", note, class_="dim") for note in comparison.notes]
    return parts


def _keys(comparison: Comparison) -> Html:
    rows: list[list[object]] = [
        [key, *("–" if value is None else str(value) for value in values)]
        for key, values in comparison.differing.items()
    ]
    if not rows:
        return sections.section(
            "config", "Config", tag("p", "No key is known in which the runs differ.")
        )
    listed = table(["key", *comparison.names], rows, "Keys in which the runs differ")
    return sections.section("config", "Config", listed)


def _findings(runs: Sequence[Judged], names: Sequence[str]) -> list[Html]:
    parts: list[Html] = []
    without = words.without_findings(runs, names)
    for name, run in zip(names, runs, strict=True):
        if not run.findings:
            continue
        items = [
            tag(
                "li",
                tag("code", finding.id),
                f" {words.steps_of(finding)}: {finding.evidence}. {finding.cause} ",
                tag("code", finding.next, class_="command"),
            )
            for finding in run.findings
        ]
        parts += [tag("h3", name), tag("ol", *items)]
    return [*parts, *(tag("p", line) for line in without)]


def comparison_charts(runs: Sequence[Judged]) -> list[Chart]:
    """Curves of all runs over one another, of what at least one has."""
    charts = []
    for identifier, title, unit, log_y, column in (
        ("loss", "Training loss, smoothed", "loss (nats per token)", False, "loss"),
        ("val", "Validation loss", "loss (nats per token)", False, "val_loss"),
        ("bits", "Bits per byte", "bits per byte", False, "val_bpb"),
        ("rate", "Learning rate", "learning rate", False, "lr"),
        ("gradient", "Gradient norm, smoothed", "norm of the gradient", True, "grad_norm"),
        ("update", "Update ratio, smoothed", "update / weights", True, "update_ratio"),
        ("speed", "Throughput", "tokens / s", False, "tokens_per_s"),
    ):
        lines = _lines(runs, column, title)
        if not lines:
            continue
        limits = loss_range(*(line.values for line in lines)) if "loss" in column else None
        height = 420 if column == "loss" else 300
        figure = line_figure(lines, unit, log_y=log_y, y_range=limits, height=height)
        summary = "; ".join(f"{line.label} ends at {line.values[-1]:.4g}" for line in lines)
        wide = column == "loss"
        switches = ("y", "x") if wide else ("y",)
        charts.append(
            Chart(identifier, title, "One line a run.", figure, summary, switches, wide=wide)
        )
    return [*charts[:1], *_gaps(runs), *charts[1:]]


def _gaps(runs: Sequence[Judged]) -> list[Chart]:
    """How far each run is from the one that it is held against, at equal steps."""
    histories = [run.history for run in runs]
    comparison = compare(histories)
    of_name = dict(zip(comparison.names, histories, strict=True))
    lines: list[Line] = []
    for number, pair in enumerate(comparison.pairs):
        run, other = of_name[pair.run], of_name[pair.against]
        if comparison.unit == "bits per byte":
            steps, values = differences(run.evals, other.evals, "val_bpb")
        elif pair.same_batches:
            steps, values = differences(run.train, other.train, "loss")
            values = np.array(smooth([int(step) for step in steps], values.tolist()))
        else:
            steps, values = differences(run.evals, other.evals, "val_loss")
        if len(steps):
            color, dash = style(number)
            label = f"{pair.run} − {pair.against}"
            lines.append(Line(label, steps, values, color, dash, markers=len(steps) <= 60))
    if not lines:
        return []
    figure = line_figure(lines, f"difference ({comparison.unit})", limits=[("", 0.0)], height=340)
    about = (
        "Below 0, the run named first has the lower loss: of training, smoothed, where both saw "
        "the same batches, else of validation."
    )
    summary = "; ".join(f"{line.label} ends at {line.values[-1]:+.3g}" for line in lines)
    return [Chart("gap", "Difference at equal steps", about, figure, summary, wide=True)]


def _lines(runs: Sequence[Judged], column: str, title: str) -> list[Line]:
    lines = []
    names = unique_names([run.history for run in runs])
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        table = run.history.evals if column.startswith("val") else run.history.train
        steps, values = finite(table["step"], table[column])
        if not len(steps):
            continue
        if "smoothed" in title:
            values = np.array(smooth([int(step) for step in steps], values.tolist()))
        color, dash = style(number)
        pointed = column.startswith("val") and len(steps) <= 60
        lines.append(Line(name, steps, values, color, dash, markers=pointed))
    return lines
