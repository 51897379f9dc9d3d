"""Where findings begin, as marks on curves: near ones share a mark."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt.health.finding import Finding
from gpt.history import History, finite
from gpt.plot import VAL
from gpt.report.figures import Figure, plain

# Marks nearer than this share of the run could not be told apart.
_NEAR = 0.02


@dataclass(frozen=True)
class Mark:
    """A place on the curves.

    Attributes:
        numbers: of the findings that begin there, counted from 1 in their order.
        step: of the first of them.
    """

    numbers: tuple[int, ...]
    step: int

    @property
    def label(self) -> str:
        """The numbers, as they stand on the mark."""
        return ", ".join(str(number) for number in self.numbers)


def place_marks(findings: Sequence[Finding], last_step: int) -> list[Mark]:
    """The marks of a run's findings, by step."""
    marks: list[Mark] = []
    ordered = sorted(enumerate(findings, start=1), key=lambda each: (each[1].first_step, each[0]))
    for number, finding in ordered:
        if marks and finding.first_step - marks[-1].step <= _NEAR * last_step:
            before = marks[-1]
            numbers = tuple(sorted((*before.numbers, number)))
            marks[-1] = Mark(numbers, before.step)
        else:
            marks.append(Mark((number,), finding.first_step))
    return marks


def loss_at(history: History, step: float) -> float | None:
    """The height of the loss curve at a step: the nearest finite training loss, else validation."""
    for table, name in ((history.train, "loss"), (history.evals, "val_loss")):
        steps, values = finite(table["step"], table[name])
        if len(steps):
            return float(values[np.abs(steps - step).argmin()])
    return None


def mark_trace(history: History, findings: Sequence[Finding], marks: Sequence[Mark]) -> Figure:
    """The marks as points on the loss curve; a click on one leads to its finding."""
    heights = [loss_at(history, mark.step) for mark in marks]
    words = [
        "<br>".join(
            f"{number}: {plain(findings[number - 1].id)}, step {findings[number - 1].first_step:,}"
            for number in mark.numbers
        )
        for mark in marks
    ]
    return {
        "type": "scatter",
        "name": "findings",
        "meta": "marks",
        "mode": "markers+text",
        "x": [mark.step for mark in marks],
        "y": heights,
        "text": [mark.label for mark in marks],
        "hovertext": words,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "customdata": [list(mark.numbers) for mark in marks],
        "textfont": {"size": 11, "color": "#FFFFFF", "weight": 700},
        "marker": {"size": 20, "color": VAL, "symbol": "circle"},
        "cliponaxis": False,
    }
