"""The report as lines for a terminal: one run on a page, or several side by side."""

import re
import textwrap
from collections.abc import Iterator, Sequence

from gpt.health.finding import Finding
from gpt.report import words
from gpt.report.compare import COVERS, Comparison, compare
from gpt.report.judged import Judged
from gpt.report.marks import place_marks
from gpt.report.markup import shown
from gpt.report.terminal_plot import loss_plot

_INDENT = 9
_COMMAND = re.compile(r"(gpt-[a-z]+|python3?|make|pip|nvidia-smi|top) ?")
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*"|['"])+""")


def run_page(judged: Judged, width: int, *, fancy: bool = True) -> Iterator[str]:
    """One run, for a terminal of `width` columns; `fancy`: it has more than ASCII."""
    yield from wrapped(judged.name[: _INDENT - 1], judged.standing.words, width, judged.name)
    for label, text in words.facts(judged):
        yield from wrapped(label, text, width)
    if judged.standing.go_on:
        yield from command("go on", judged.standing.go_on, width)
        yield from wrapped("", judged.standing.go_on_words, width)
    marks = place_marks(judged.findings, judged.history.last_step)
    plot = loss_plot(judged.history, marks, width, fancy=fancy)
    if plot:
        yield ""
        yield from wrapped("loss", _legend(judged), width)
        yield from plot
    yield ""
    yield from _verdict(judged, width)


def runs_page(runs: Sequence[Judged], width: int) -> Iterator[str]:
    """Several runs side by side, their differences, and the findings of each."""
    comparison = compare([run.history for run in runs])
    yield from _side_by_side(runs, width)
    yield ""
    yield from _differing(comparison, width)
    yield from _differences(comparison, width)
    for name, run in zip(comparison.names, runs, strict=True):
        if run.findings:
            yield ""
            yield f"{shown(name)}: {words.verdict(run)}"
            yield from _findings(run, width)
    for line in words.without_findings(runs, comparison.names):
        yield ""
        yield from wrapped("verdict", line, width)


def wrapped(label: str, text: str, width: int, heading: str | None = None) -> list[str]:
    """A text beside its label; a `heading` too long for that stands above it."""
    text = " ".join(shown(text).split())
    start = shown(label).ljust(_INDENT)
    above = []
    if heading is not None and len(shown(heading)) >= _INDENT:
        above, start = [shown(heading)], " " * _INDENT
    return above + _wrapped(text, width, start, " " * _INDENT)


def _wrapped(text: str, width: int, start: str, following: str) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, _INDENT + 20),
        initial_indent=start,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def command(label: str, text: str, width: int) -> list[str]:
    """A command beside its label; broken so that it can be pasted whole.

    What is said of it, behind a `#`, stands on lines of its own. Text that is no command is wrapped
    as text.
    """
    if not _COMMAND.match(text) or "\n" in text:
        return wrapped(label, text, width)
    typed = _WORD.findall(shown(text))
    remark = typed.index("#") if "#" in typed else len(typed)
    lines, line = [], shown(label).ljust(_INDENT)
    room = max(width, _INDENT + 20) - 2
    for piece in _pieces(typed[:remark]):
        if len(line) > _INDENT and len(line) + len(piece) + 1 > room:
            lines.append(f"{line} \\")
            line = " " * (_INDENT + 2)
        line += piece if line.endswith(" ") else f" {piece}"
    start = f"{'':{_INDENT}}# "
    return [*lines, line, *_wrapped(" ".join(typed[remark + 1 :]), width, start, start)]


def _pieces(typed: Sequence[str]) -> list[str]:
    """The words of a command, an option together with its value."""
    pieces: list[str] = []
    for word in typed:
        before = pieces[-1] if pieces else ""
        if before.startswith("--") and " " not in before and not word.startswith("--"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


def _legend(judged: Judged) -> str:
    history = judged.history
    parts = ["train, smoothed"] if "loss" in history.train else []
    parts += ["o validation"] if "val_loss" in history.evals else []
    parts += ["numbers: where findings begin"] if judged.findings else []
    return "; ".join(parts)


def _verdict(judged: Judged, width: int) -> Iterator[str]:
    yield from wrapped("verdict", words.verdict(judged), width)
    yield from _findings(judged, width)
    if judged.findings:
        yield ""
    for line in words.signals(judged):
        yield from wrapped("", line, width)


def _findings(judged: Judged, width: int) -> Iterator[str]:
    for number, finding in enumerate(judged.findings, start=1):
        yield ""
        yield from _finding(number, finding, width)


def _finding(number: int, finding: Finding, width: int) -> Iterator[str]:
    yield from wrapped(str(number), f"{finding.id}: {words.title(finding)}", width)
    yield from wrapped("  when", words.steps_of(finding), width)
    yield from wrapped("  seen", finding.evidence, width)
    yield from wrapped("  cause", finding.cause, width)
    yield from command("  next", finding.next, width)


def _side_by_side(runs: Sequence[Judged], width: int) -> Iterator[str]:
    rows = [[shown(cell) for cell in row] for row in words.side_by_side(runs)]
    columns = list(words.COLUMNS)
    for count in (len(columns), len(columns) - 1):  # the findings come once more, below
        kept = [row[:count] for row in (columns, *rows)]
        widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
        if sum(widths) + 2 * (count - 1) <= width:
            for row in kept:
                yield "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            return
    for row in rows:  # too narrow for a table
        yield row[0]
        pairs = [f"{name} {value}" for name, value in zip(columns[1:], row[1:], strict=True)]
        yield from wrapped("", ", ".join(pairs), width)


def _differing(comparison: Comparison, width: int) -> Iterator[str]:
    if not comparison.differing:
        yield from wrapped("config", "no key is known in which the runs differ", width)
    for number, (key, values) in enumerate(comparison.differing.items()):
        text = f"{key}: {', '.join('–' if value is None else str(value) for value in values)}"
        yield from wrapped("" if number else "differ", text, width)


def _differences(comparison: Comparison, width: int) -> Iterator[str]:
    if comparison.seeds:
        yield ""
        yield "across seeds"
        lines = [group.words() for group in comparison.seeds]
        lines += [gap.words() for gap in comparison.seed_gaps]
        for line in lines:
            yield from wrapped("", line, width)
    for pair in comparison.pairs:
        yield ""
        yield shown(f"{pair.run} against {pair.against}")
        for line in pair.words():
            yield from wrapped("", line, width)
    if comparison.pairs:
        yield ""
        yield from wrapped("note", f"intervals of two runs cover {COVERS}", width)
    for note in comparison.notes:
        yield from wrapped("note", note, width)
