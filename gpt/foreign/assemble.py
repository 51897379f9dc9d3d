"""From a log's cells to a History: one line a step, our names, our units."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpt.foreign.lines import unreadable
from gpt.foreign.sheet import Cells, Sheet
from gpt.foreign.steps import Rows, Steps, number_rows
from gpt.history import Column, History, Table

_ON_TRAIN_LINES = ("tokens", "epoch", "time_s")
_ONLY_WHERE_MEASURED = ("loss", "ppl", "bpb", "step", "total_steps")


def assemble(sheet: Sheet, path: Path, source: str, name: str) -> History:
    """The History of what a reader took from the log at `path`.

    Raises UserError if there is no loss in it.
    """
    losses = _train_losses(sheet)
    validated = {name: _validation(sheet, name) for name in ("val_loss", "val_bpb")}
    if validated["val_loss"] is None:
        validated["val_loss"] = _from_perplexity(sheet, "val_ppl", "validation loss")
    beside = _validation(sheet, "train_loss")
    if losses is None and beside is not None:
        sheet.notes.append("the training loss is the one that was measured beside the validation")
        losses = beside
    evaluated = [cells[0] for cells in validated.values() if cells is not None]
    if losses is None and not evaluated:
        raise unreadable(path, _without_loss(sheet))
    val_rows = np.unique(np.concatenate([*evaluated, np.empty(0, np.int64)])).astype(np.int64)
    train_rows = losses[0] if losses is not None else np.empty(0, np.int64)
    main = train_rows if len(train_rows) else val_rows
    steps = number_rows(sheet, main, np.union1d(train_rows, val_rows))
    train = _train_table(sheet, steps, losses, val_rows if source == "nanogpt" else None)
    beside = beside or _on_rows(losses, val_rows)
    spread = _validation(sheet, "val_se")
    evals = _eval_table(steps, val_rows, {**validated, "train_loss": beside, "val_se": spread})
    total = _total(sheet, steps)
    return History(
        name=name,
        source=source,
        train=train,
        evals=evals,
        layers=_layers(sheet, steps),
        total_steps=total,
        vocab_size=sheet.vocab_size,
        finished=total is None or _reached(total, train if len(train) else evals),
        path=path,
        notes=tuple(sheet.notes),
    )


Measured = tuple[Rows, Column]


def _cells(column: Cells | None) -> Measured | None:
    return (column.row_numbers, column.numbers) if column is not None else None


def _best(sheet: Sheet, name: str) -> Cells | None:
    return next(iter(sheet.named(name)), None)


def _train_losses(sheet: Sheet) -> Measured | None:
    """Rows with a training loss; a nan beside a validation loss only fills an empty cell."""
    found = _cells(_best(sheet, "loss"))
    if found is None:
        return _from_perplexity(sheet, "ppl", "training loss")
    validated = _cells(_best(sheet, "val_loss"))
    if validated is None:
        return found
    rows, losses = found
    other = validated[0][np.isfinite(validated[1])]
    filled = np.isnan(losses) & np.isin(rows, other)
    if not np.isfinite(losses).any() or not filled.any():
        return found
    return rows[~filled], losses[~filled]


def _from_perplexity(sheet: Sheet, name: str, what: str) -> Measured | None:
    found = _cells(_best(sheet, name))
    if found is None:
        return None
    sheet.notes.append(f"the log has perplexities only: the {what} is their logarithm, in nats")
    with np.errstate(divide="ignore", invalid="ignore"):
        return found[0], np.log(found[1])


def _validation(sheet: Sheet, name: str) -> Measured | None:
    """Rows with such a value; a nan that a finite one follows only fills an empty cell."""
    found = _cells(_best(sheet, name))
    if found is None:
        return None
    rows, values = found
    finite = np.flatnonzero(np.isfinite(values))
    last = finite[-1] if len(finite) else -1
    kept = ~np.isnan(values) | (np.arange(len(values)) > last)
    return rows[kept], values[kept]


def _on_rows(losses: Measured | None, rows: Rows) -> Measured | None:
    """The training losses that stand on the same lines as validation losses."""
    if losses is None:
        return None
    there = np.isin(losses[0], rows)
    return losses[0][there], losses[1][there]


def _without_loss(sheet: Sheet) -> str:
    found = [*sheet.columns, *sheet.unknown]
    if not found:
        return "no line in it tells a loss"
    shown = ", ".join(repr(name) for name in found[:12])
    more = f" and {len(found) - 12:,} more" if len(found) > 12 else ""
    return f"no column is a loss that we know, there are {shown}{more}; call one of them loss"


def _train_table(
    sheet: Sheet, steps: Steps, losses: Measured | None, timed_wrong: Rows | None
) -> Table:
    """One line a step that has a loss; what else was measured at that step stands beside it."""
    if losses is None:
        return Table({"step": np.empty(0)})
    rows, places = _one_a_step(steps, losses[0])
    columns = {"step": steps.step[rows], "loss": losses[1][places]}
    for name, cells in _companions(sheet).items():
        columns[name] = _beside(sheet, steps, rows, cells, name)
    if "lr" not in columns:
        group = next((name for name in columns if name.startswith("lrs/")), None)
        if group is not None:
            columns["lr"] = columns[group]
    times = columns.get("step_time_s")
    if times is not None and timed_wrong is not None:
        # nanoGPT's clock runs on through an evaluation, which that iteration then seems to take.
        times[np.isin(columns["step"], steps.step[timed_wrong])] = np.nan
    if times is not None and sheet.tokens_per_step and "tokens_per_s" not in columns:
        with np.errstate(divide="ignore"):
            columns["tokens_per_s"] = sheet.tokens_per_step / times
    return Table(columns)


def _companions(sheet: Sheet) -> dict[str, Cells]:
    """The best column of each further name that a train line has."""
    names = dict.fromkeys(
        column.meaning.name
        for column in sheet.columns.values()
        if column.meaning.place == "train" or column.meaning.name in _ON_TRAIN_LINES
    )
    best = {name: _best(sheet, name) for name in names if name not in _ONLY_WHERE_MEASURED}
    return {name: column for name, column in best.items() if column is not None}


def _one_a_step(steps: Steps, rows: Rows) -> tuple[Rows, Rows]:
    """Rows that count, in the order of their steps, of each step the last one; and their places."""
    places = np.flatnonzero(steps.counts[rows])
    order = places[np.lexsort((rows[places], steps.step[rows[places]]))]
    if len(order):
        step = steps.step[rows[order]]
        order = order[np.append(step[1:] != step[:-1], True)]
    return rows[order], order


def _beside(sheet: Sheet, steps: Steps, rows: Rows, cells: Cells, name: str) -> Column:
    """A column's values at the steps of some rows: from the row itself, or from the same step.

    Where it was hardly ever measured at the same steps, the last value before.
    """
    there, places = _one_a_step(steps, cells.row_numbers)
    if not len(there):
        return np.full(len(rows), np.nan)
    values, at, wanted = cells.numbers[places], steps.step[there], steps.step[rows]
    before = np.searchsorted(at, wanted, side="right") - 1
    found = np.where(before >= 0, values[np.maximum(before, 0)], np.nan)
    same = (before >= 0) & (at[np.maximum(before, 0)] == wanted)
    if 2 * int(same.sum()) >= min(len(there), len(rows)):
        return np.where(same, found, np.nan)
    sheet.notes.append(
        f"{name} was logged at other steps than the loss: each line has the last value before it"
    )
    return found


def _eval_table(steps: Steps, rows: Rows, measured: dict[str, Measured | None]) -> Table:
    chosen, _ = _one_a_step(steps, rows)
    columns = {"step": steps.step[chosen]}
    for name, cells in measured.items():
        if cells is None:
            continue
        there, places = _one_a_step(steps, cells[0])
        if not len(there):
            continue
        at = np.searchsorted(steps.step[there], columns["step"]).clip(max=len(there) - 1)
        same = steps.step[there][at] == columns["step"]
        if same.any():
            columns[name] = np.where(same, cells[1][places][at], np.nan)
    return Table(columns)


def _layers(sheet: Sheet, steps: Steps) -> Table:
    found = [column for column in sheet.columns.values() if column.meaning.place == "layers"]
    if not found:
        return Table({"step": np.empty(0)})
    rows, _ = _one_a_step(steps, np.unique(np.concatenate([cells.row_numbers for cells in found])))
    columns = {"step": steps.step[rows]}
    for cells in found:
        there, places = _one_a_step(steps, cells.row_numbers)
        column = np.full(len(rows), np.nan)
        column[np.searchsorted(columns["step"], steps.step[there])] = cells.numbers[places]
        columns[cells.meaning.name] = column
    return Table(columns)


def _total(sheet: Sheet, steps: Steps) -> int | None:
    """The planned length: what the steps are counted out of, a column of it, or a line."""
    if steps.total:
        return steps.total
    column = _best(sheet, "total_steps")
    if column is not None and 0 < column.values[-1] < 1e15:
        return int(column.values[-1])
    return sheet.total_steps


def _reached(total: int, table: Table) -> bool:
    """Whether the log goes to the end: the next line would have come later."""
    steps = table["step"]
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return bool(len(steps) and steps[-1] + max(1.0, gap) >= total)
