"""The parts of the page about one run: verdict, numbers, samples, tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.history import History
from gpt.metrics import Record, duration
from gpt.ratepolicy import read_record
from gpt.report import words
from gpt.report.figures import Chart
from gpt.report.judged import Judged
from gpt.report.marks import place_marks
from gpt.report.markup import Html, table, tag, together
from gpt.report.sketch import sketch

MOST_ROWS = 200
MOST_SAMPLES = 40
MOST_TEXT = 20_000


def section(identifier: str, title: str, *children: object) -> Html:
    """A part of the page with its heading."""
    heading = tag("h2", title, id=f"{identifier}-title")
    return tag("section", heading, *children, id=identifier, aria_labelledby=f"{identifier}-title")


def verdict(judged: Judged, *, linked: bool) -> Html:
    """The outcome, and every finding; `linked`: there is a loss chart with marks to go to."""
    outcome = words.verdict(judged)
    sign, kind = "", ""
    if judged.findings:
        sign, kind = "! ", " bad"
    elif outcome == words.HEALTHY:
        sign, kind = "✓ ", " good"
    marks = place_marks(judged.findings, judged.history.last_step) if linked else []
    mark_of = {number: mark.numbers[0] for mark in marks for number in mark.numbers}
    items = [
        _finding(number, judged, mark_of.get(number))
        for number in range(1, len(judged.findings) + 1)
    ]
    return together(
        tag("p", sign, outcome, class_=f"verdict{kind}"),
        *(
            tag("p", f"{line[0].upper()}{line[1:]}.", class_="dim")
            for line in words.signals(judged)
        ),
        tag("ol", *items, class_="findings") if items else None,
    )


def _finding(number: int, judged: Judged, mark: int | None) -> Html:
    finding = judged.findings[number - 1]
    link = None
    if mark is not None:
        link = tag("a", "show on the curve", href=f"#mark-{mark}", data_mark=number)
    top = tag(
        "div",
        tag("span", number, class_="number", aria_hidden="true"),
        tag("h3", words.title(finding)),
        tag("code", finding.id),
        tag("span", words.steps_of(finding), class_="dim"),
        link,
        class_="top",
    )
    rows = (
        ("Evidence", finding.evidence),
        ("Likely cause", finding.cause),
        ("Next", tag("code", finding.next, class_="command")),
    )
    listed = [part for label, text in rows for part in (tag("dt", label), tag("dd", text))]
    return tag("li", top, tag("dl", *listed), class_="finding", id=f"finding-{number}", tabindex=-1)


def numbers(judged: Judged) -> Html:
    """The few numbers that one asks for first, and then all of them in words."""
    summary = judged.summary
    share = None
    if summary.total_steps:
        share = f"of {summary.total_steps:,} ({summary.step / summary.total_steps:.0%})"
    tiles: list[tuple[str, str, str | None]] = [("step", f"{summary.step:,}", share)]
    if summary.val_loss is not None:
        best = f"best {summary.best_val_loss:.4f}"
        tiles.append(("validation loss", f"{summary.val_loss:.4f}", best))
    if summary.val_bpb is not None:
        tiles.append(
            ("bits per byte", f"{summary.val_bpb:.4f}", f"best {summary.best_val_bpb:.4f}")
        )
    if summary.train_loss is not None:
        best = f"best {summary.best_train_loss:.4f}"
        tiles.append(("training loss", f"{summary.train_loss:.4f}", best))
    if summary.seconds is not None:
        left = summary.seconds_left if judged.standing.state == "running" else None
        rest = None if left is None else f"{duration(left)} left"
        tiles.append(("time", duration(summary.seconds), rest))
    shown = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))
        for name, value, more in tiles
    ]
    labels = {"stands": "Stands at", "train": "Training loss", "val": "Validation", "rate": "Rate"}
    labels |= {"gradient": "Gradient", "speed": "Speed"}
    rows = [
        part
        for label, text in words.facts(judged)
        for part in (tag("dt", labels[label]), tag("dd", text))
    ]
    if judged.standing.go_on:
        command = tag("code", judged.standing.go_on, class_="command")
        rows += [tag("dt", "Go on"), tag("dd", command, tag("small", judged.standing.go_on_words))]
    return together(tag("dl", *shown, class_="tiles"), tag("dl", *rows))


def charts(drawn: Sequence[Chart]) -> Html:
    """The charts, each as a still picture that the page's script replaces."""
    return tag("div", *(_chart(chart) for chart in drawn), class_="charts")


def _chart(chart: Chart) -> Html:
    label = f"{chart.title}. {chart.summary}"
    still = sketch(chart.figure, label)
    note = tag("noscript", tag("p", "This chart is drawn by a script. ", chart.summary))
    switches = [
        tag("label", tag("input", type="checkbox", data_axis=axis), f"log {name}")
        for axis, name in (("y", "height"), ("x", "steps"))
        if axis in chart.switches
    ]
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("div", *switches, class_="switches") if switches else None,
            tag("h3", chart.title),
            tag("p", chart.about, class_="dim"),
        ),
        tag(
            "div",
            still or note,
            class_="chart",
            id=f"chart-{chart.id}",
            data_figure=chart.id,
            role="img",
            aria_label=label,
            style=f"min-height:{chart.figure['layout']['height']}px",
        ),
        class_="wide" if chart.wide else None,
        id=chart.id,
    )


def samples(history: History) -> Html | None:
    """What the model wrote on the way, the last one open."""
    found = [event for event in history.events if event.get("event") == "sample"]
    kept = [found[index] for index in _some(len(found), MOST_SAMPLES)]
    if not kept:
        return None
    items = []
    for event in reversed(kept):
        prompt, text = str(event.get("prompt", "")), str(event.get("text", ""))[:MOST_TEXT]
        blank = None if text.strip() else tag("i", "(white space)" if text else "(nothing)")
        body = tag("pre", tag("b", prompt), text, blank, class_="sample", dir="auto")
        heading = tag("summary", f"step {_number(event.get('step'))}")
        items.append(tag("details", heading, body, open=event is kept[-1]))
    return section("samples", "Samples", _cut(len(found), len(kept)), *items)


def evaluations(history: History) -> Html | None:
    """The evaluations as a table."""
    evals = history.evals
    if not len(evals):
        return None
    columns = {
        "val_loss": ("validation loss", ".4f"),
        "val_se": ("standard error", ".4f"),
        "val_bpb": ("bits per byte", ".4f"),
        "train_loss": ("training loss", ".4f"),
        "val_tokens": ("tokens", ",.0f"),
    }
    there = {name: shape for name, shape in columns.items() if name in evals}
    best = int(np.nanargmin(evals["val_loss"])) if "val_loss" in evals else None
    kept = _some(len(evals), MOST_ROWS)
    rows: list[list[object]] = []
    for index in kept:
        numbers = [(evals[name][index], form) for name, (_, form) in there.items()]
        cells = [format(value, form) if np.isfinite(value) else "–" for value, form in numbers]
        rows.append([f"{evals['step'][index]:,.0f}", *cells, "best" if index == best else ""])
    header: list[object] = ["step", *(title for title, _ in there.values()), ""]
    listed = table(header, rows)
    box = tag("div", listed, class_="tall") if len(rows) > 20 else listed
    return section("evaluations", "Evaluations", _cut(len(evals), len(kept)), box)


def config(history: History) -> Html | None:
    """Every key of the config, by section."""
    if history.config is None:
        return None
    tables = [
        table(["key", "value"], [[key, _yaml(value)] for key, value in values.items()], name)
        for name, values in history.config.model_dump(mode="json").items()
    ]
    return section("config", "Config", tag("div", *tables, class_="tables"))


def environment(history: History) -> Html | None:
    """What the run began with, and what was found out about its text."""
    parts = []
    for title, record in (("Run", history.start), ("Text", history.data_check)):
        rows = _details(record)
        if rows:
            parts.append(table(["what", "value"], [[key, value] for key, value in rows], title))
    if not parts:
        return None
    return section("environment", "Environment", tag("div", *parts, class_="tables"))


def events(history: History) -> Html | None:
    """What happened on the way, and what was noticed while reading the log."""
    told = {"sample", "run", "data_check"}
    found = [event for event in history.events if str(event.get("event")) not in told]
    happened: list[Record | list[object]] = [*found, *_rate_changes(history)]
    kept: list[list[object]] = [
        row
        if isinstance(row := happened[index], list)
        else [_number(row.get("step")), _value(row.get("event")), _detail_text(row)]
        for index in _some(len(happened), MOST_ROWS)
    ]
    parts: list[object] = []
    if kept:
        listed = table(["step", "event", "details"], kept)
        box = tag("div", listed, class_="tall") if len(kept) > 20 else listed
        parts += [_cut(len(happened), len(kept)), box]
    if history.notes:
        parts.append(tag("ul", *(tag("li", note) for note in history.notes)))
    return section("events", "Events and notes", *parts) if parts else None


def _rate_changes(history: History) -> list[list[object]]:
    if history.path is None or not history.path.is_dir():
        return []
    try:
        changes = read_record(history.path)
    except UserError as error:
        return [["", "rate.json", str(error)]]
    return [
        [f"{change.step:,}", "rate changed", f"{change.policy}: {change.keys_text()}"]
        for change in changes
    ]


def _details(record: Record) -> list[tuple[str, str]]:
    aside = {"kind", "event", "step"}
    return [(key, _value(value)) for key, value in record.items() if key not in aside]


def _detail_text(record: Record) -> str:
    if record.get("event") == "finding":
        return f"{record.get('id')} {record.get('state')}s: {record.get('evidence')}"[:MOST_TEXT]
    return "; ".join(f"{key}: {value}" for key, value in _details(record))[:MOST_TEXT]


def _value(value: Any) -> str:  # noqa: ANN401 (whatever stands in a log)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _yaml(value: object) -> str:
    """A value as one writes it into a config."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _some(count: int, most: int) -> list[int]:
    """Indices of at most so many of `count` things, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most).tolist()})


def _cut(count: int, kept: int) -> Html | None:
    """Says that not all are shown."""
    return tag("p", f"{kept:,} of {count:,} are shown.", class_="dim") if kept < count else None


def joined(parts: Iterable[Html | None]) -> list[Html]:
    """Those that are there."""
    return [part for part in parts if part is not None]
