"""Which step each row of a log belongs to: restarts, steps counted anew, logs without steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt.foreign.sheet import Cells, Sheet
from gpt.history import Column

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_LARGEST = 1e15
# More of the rows than this going back is no restart, but lines in no order.
_DISORDER = 0.2


@dataclass(frozen=True)
class Steps:
    """Of each row its step, and whether it counts: a restart writes some steps again.

    Attributes:
        step: by row; nan before the first one that is known.
        counts: by row; False for what a restart replaced, and for a torn line.
        total: the planned length as the step's own column tells it, `n/m`.
    """

    step: Column
    counts: Mask
    total: int | None = None


def number_rows(sheet: Sheet, main: Rows, measured: Rows) -> Steps:
    """Finds the steps of all rows.

    `main` are the rows that follow one another in time, those with a training loss if there are
    any; `measured` all that have a loss. Both ascend. Says in the sheet's notes what was decided.
    """
    columns = _by_worth(sheet, measured)
    if not columns:
        sheet.notes.append("no column tells the step: the rows were counted instead")
        rows = np.arange(1, sheet.rows + 1, dtype=np.float64)
        return Steps(rows, np.ones(sheet.rows, bool))
    step = _merged(sheet, columns)
    unknown = np.isnan(step)
    step = _carried_on(step)
    torn = sheet.breaks_off and _is_torn(step, unknown, main, measured)
    if torn:
        sheet.notes.append("the last line breaks off before the end of its step: it was left out")
        main, measured = main[main < sheet.rows - 1], measured[:-1]
    missing = int(unknown[measured].sum())
    if missing:
        sheet.notes.append(
            f"lines with a loss and without a step: {missing:,}; they count as the step before"
        )
    total = next(
        (sheet.totals[each.spelled] for each in columns if each.spelled in sheet.totals), None
    )
    anew = _counted_anew(sheet, step, main, total)
    if anew is not None:
        sheet.notes.append(
            "the steps are counted anew in each epoch: here the epochs stand behind one another"
        )
        step, total = anew, None
        counts = np.ones(sheet.rows, bool)
    else:
        counts = _surviving(sheet, step, main)
    if torn:
        counts[-1] = False
    return Steps(step, counts, total)


def _is_torn(step: Column, unknown: Mask, main: Rows, measured: Rows) -> bool:
    """Whether the last row is a line cut short: a 20 that would have become 2000 is no restart.

    So is the only row whose step is unknown, if it follows on the others.
    """
    last = len(step) - 1
    if len(measured) < 2 or measured[-1] != last:
        return False
    lacks = unknown[last] and main[-1] == last and not unknown[measured[:-1]].any()
    return bool(lacks or step[last] < step[measured[-2]])


def _by_worth(sheet: Sheet, measured: Rows) -> list[Cells]:
    """The columns of steps, first the one that most rows with a loss have; of equals, by name."""

    def worth(column: Cells) -> tuple[int, int, int, int]:
        covered = int(np.isin(measured, column.row_numbers, assume_unique=True).sum())
        distinct = len(np.unique(column.numbers))
        return covered, distinct, -column.meaning.rank, -column.order

    columns = [column for column in sheet.columns.values() if column.meaning.name == "step"]
    worths = {column.spelled: worth(column) for column in columns}
    # One number on many lines counts something else.
    usable = [
        column
        for column in columns
        if worths[column.spelled][0] and (worths[column.spelled][1] > 1 or len(column.rows) < 3)
    ]
    return sorted(usable, key=lambda column: worths[column.spelled], reverse=True)


def _merged(sheet: Sheet, columns: list[Cells]) -> Column:
    """The first column; its gaps are filled from others that count the same, `iter` and `step`."""
    step = np.full(sheet.rows, np.nan)
    for column in columns:
        numbers, rows = column.numbers, column.row_numbers
        known = np.isfinite(numbers) & (np.abs(numbers) <= _LARGEST)
        numbers, rows = numbers[known], rows[known]
        both = ~np.isnan(step[rows])
        if (step[rows[both]] == numbers[both]).all():
            step[rows] = numbers
    return step


def _carried_on(step: Column) -> Column:
    """Unknown steps become the last known one before; those at the beginning become 0."""
    last = np.maximum.accumulate(np.where(np.isnan(step), -1, np.arange(len(step))))
    return np.where(last >= 0, step[np.maximum(last, 0)], 0.0)


def _counted_anew(sheet: Sheet, step: Column, main: Rows, total: int | None) -> Column | None:
    """The steps put behind one another, if they fall back whenever an epoch ends; or None."""
    epochs = next(iter(sheet.named("epoch")), None)
    back = np.flatnonzero(np.diff(step[main]) < 0) + 1
    if epochs is None or not len(back):
        return None
    epoch = np.full(sheet.rows, np.nan)
    epoch[epochs.row_numbers] = np.floor(epochs.numbers)
    epoch = _carried_on(epoch)[main]
    if not (epoch[back] > epoch[back - 1]).all():
        return None
    offset = np.zeros(sheet.rows)
    gaps = np.diff(step[main])
    gap = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 1.0
    for place in back:
        ended, begins = float(step[main[place - 1]]), float(step[main[place]])
        length = float(total) if total and total >= ended else ended + max(0.0, gap - begins)
        offset[main[place] :] += length
    return step + offset


def _surviving(sheet: Sheet, step: Column, main: Rows) -> Mask:
    """Which rows no restart replaced: from the step on that it began at, later lines count."""
    back = np.flatnonzero(np.diff(step[main]) < 0) + 1
    restarts = len(back)
    if restarts >= 3 and restarts > _DISORDER * len(main):
        sheet.notes.append("the lines are not in the order of their steps: they were sorted")
        return np.ones(sheet.rows, bool)
    if restarts:
        times = "once" if restarts == 1 else f"{restarts:,} times"
        sheet.notes.append(
            f"the steps go back {times}, first to {step[main[back[0]]]:,.0f}: the run was "
            "restarted, and the later lines replace the earlier ones from there on"
        )
    # A row counts if its step lies before every restart that comes after it. What stands between
    # the last row before and a restart's first is the restart's: the evaluation that it began with.
    begins = np.full(sheet.rows + 1, np.inf)
    for place in back:
        after = main[place - 1] + 1
        begins[after] = min(begins[after], step[main[place]])
    later = np.minimum.accumulate(begins[::-1])[::-1]
    return np.asarray(step < later[1:])
