"""A run's log as columns: what was measured at each step, and what is known of the run besides.

Judging it is `health`'s business; logs of other programs become a History in `foreign`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt.config import Config
from gpt.configfile import load_config
from gpt.errors import UserError
from gpt.metrics import METRICS_NAME, Record, each_record

Column = npt.NDArray[np.float64]
# Records of ours are nested twice; a file may hold anything.
_DEEPEST = 8
MOST_COLUMNS = 4096
LARGEST_STEP = 1e15  # beyond it, neighbouring steps are hard to tell apart
Rows = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Table:
    """Rows of one kind in the order of their steps, as columns of equal length.

    `step` is always there. nan: not measured, or not a number; a train row's loss was measured.
    """

    columns: dict[str, Column]

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> Table:
        """Numbers of the records by name; nested ones as `name/inner`, texts are left out."""
        rows = TableRows()
        for record in records:
            rows.add(record)
        return rows.table()

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __contains__(self, name: str) -> bool:
        """Whether the column exists and holds any finite number."""
        return name in self.columns and bool(np.isfinite(self.columns[name]).any())

    def __getitem__(self, name: str) -> Column:
        """The column; all nan where it was never measured."""
        return self.columns.get(name, np.full(len(self), math.nan))

    def until(self, step: float) -> Table:
        """The rows up to and including a step."""
        kept = self.columns["step"] <= step
        return Table({name: values[kept] for name, values in self.columns.items()})

    def named(self, prefix: str) -> dict[str, Column]:
        """The columns `prefix/inner`, by their inner names."""
        start = f"{prefix}/"
        return {
            name.removeprefix(start): values
            for name, values in self.columns.items()
            if name.startswith(start)
        }


FIRST_ROWS, MOST_LATE = 16, 200
_NUMBERS = (int, float)  # asked for in every field of every line: a union takes three times as long


class TableRows:
    """A Table under way: rows are added one by one, cheaply.

    Names that first occur after FIRST_ROWS rows are left out once there are MOST_LATE columns:
    a log with a new name on each line would take the square of its size.

    Where `most` is given, it never has more rows: when it is full, each two become one, and from
    then on each row stands for twice as many lines, as if the log were written half as often.
    """

    def __init__(self, most: int | None = None) -> None:
        """No rows yet; `most` is even."""
        self._columns = {"step": array("d")}
        self._count = 0
        self._most = most
        self._lines, self._in_last = 1, 1  # that a row stands for, and that the last one does yet

    def add(self, record: Mapping[str, Any]) -> None:
        """One more row; a record without a step is none."""
        row = _flat(record)
        if not math.isfinite(row.get("step", math.nan)):
            return
        if not row.keys() <= self._columns.keys():
            self._add_columns(row)
        if self._in_last == self._lines and self._count == self._most:
            self._halve()
        if self._count and self._in_last < self._lines:
            share = self._in_last / (self._in_last + 1)
            for name, column in self._columns.items():
                column[-1] = _joined(name, column[-1], row.get(name, math.nan), share)
            self._in_last += 1
            return
        for name, column in self._columns.items():
            column.append(row.get(name, math.nan))
        self._count += 1
        self._in_last = 1

    def _add_columns(self, row: Mapping[str, float]) -> None:
        new = sorted(row.keys() - self._columns.keys())
        if self._count >= FIRST_ROWS:
            new = new[: max(0, MOST_LATE - len(self._columns))]
        for name in new:
            self._columns[name] = array("d", [math.nan]) * self._count

    def _halve(self) -> None:
        for name, column in self._columns.items():
            pairs = zip(column[::2], column[1::2], strict=True)
            self._columns[name] = array("d", [_joined(name, a, b, 0.5) for a, b in pairs])
        self._count //= 2
        self._lines *= 2
        self._in_last = self._lines

    def table(self) -> Table:
        """All rows so far."""
        return Table({name: np.array(column) for name, column in self._columns.items()})


# What a line tells of all steps since the line before; the rest is of its own step.
_MEANS = {"loss_mean", "clipped_share", "tokens_per_s", "cpu_share", "others_share"}
_SUMS = {"skipped", "major_faults"}
_MAXIMA = {"loss_max", "grad_norm_max"}


def _joined(name: str, first: float, second: float, share: float) -> float:
    """A column's values of two lines in a row as one; `share` is the first one's in both."""
    if math.isnan(second):
        return first
    if math.isnan(first):
        return second
    if name in _MEANS:
        return share * first + (1 - share) * second
    if name in _SUMS:
        return first + second
    return max(first, second) if name in _MAXIMA else second


@dataclass(frozen=True)
class History:
    """All that is known of a run.

    Attributes:
        name: how to call it.
        source: what wrote the log: `gpt-train`, `csv`, `jsonl`, `nanogpt`, `console`,
            `trainer_state`, `tensorboard`.
        train: logged steps: step, loss (nats per token), and of lr, grad_norm, clipped_share,
            update_ratio, tokens_per_s, time_s and so on what there is.
        evals: evaluations: step, val_loss, and maybe val_bpb, train_loss.
        layers: what was measured layer by layer, now and then: `update_ratio/blocks.0.attn.wq`.
        events: what happened, with step and event, as it was written.
        total_steps: the planned length; None where nobody knows.
        vocab_size: the number of ids, where known: ln of it is the loss of a guess.
        unigram_entropy: of the training tokens, nats per token: the loss of knowing frequencies.
        finished: whether the log ends where the run was meant to end, or nobody knows better.
        path: where it was read from.
    """

    name: str
    source: str
    train: Table
    evals: Table
    layers: Table
    events: tuple[Record, ...] = ()
    config: Config | None = None
    total_steps: int | None = None
    vocab_size: int | None = None
    unigram_entropy: float | None = None
    finished: bool = True
    path: Path | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def last_step(self) -> int:
        """The last step that anything was written of."""
        ends = [int(table["step"][-1]) for table in (self.train, self.evals) if len(table)]
        return max(ends, default=0)

    @cached_property
    def start(self) -> Record:
        """The event that a run of ours begins with: sizes, device, environment; empty if none."""
        started = (event for event in reversed(self.events) if event.get("event") == "run")
        return next(started, {})

    @cached_property
    def data_check(self) -> Record:
        """What was found out about the text before the first step, numbers alone."""
        found = next((event for event in self.events if event.get("event") == "data_check"), {})
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    @property
    def chance(self) -> float | None:
        """The loss of a uniform guess, ln V; None where V is not known."""
        return math.log(self.vocab_size) if self.vocab_size else None

    def until(self, step: int) -> History:
        """What was known when `step` had been logged; the same run, not yet finished."""
        return replace(
            self,
            train=self.train.until(step),
            evals=self.evals.until(step),
            layers=self.layers.until(step),
            events=tuple(event for event in self.events if event.get("step", 0) <= step),
            finished=self.finished and step >= self.last_step,
        )


class HistoryLog:
    """A History under way, from the lines of a metrics.jsonl of ours as they are written."""

    def __init__(
        self, config: Config | None = None, *, name: str = "run", most: int | None = None
    ) -> None:
        """Nothing is written yet; of each kind it will hold `most` rows, or all."""
        self._config, self._name = config, name
        self._tables = {kind: TableRows(most) for kind in ("train", "eval", "layers")}
        self._events: list[Record] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """One more line; one whose step is no number is left out."""
        kind, step = record.get("kind"), record.get("step", 0)
        if not isinstance(step, _NUMBERS) or not abs(_float(step)) <= LARGEST_STEP:
            return
        if kind == "event":
            self._events.append({"step": step, **record})
        elif isinstance(kind, str) and kind in self._tables:
            self._tables[kind].add(record)

    def history(self) -> History:
        """All that was written so far."""
        events = tuple(self._events)
        started = (event for event in reversed(events) if event.get("event") == "run")
        start: Record = next(started, {})
        data_check = next((event for event in events if event.get("event") == "data_check"), {})
        train = self._tables["train"].table()
        total = _count(start, "total_steps")
        last = int(train["step"][-1]) if len(train) else 0
        ends = [event for event in events if event.get("event") in ("end", "diverged", "resumed")]
        ended = bool(ends) and ends[-1]["event"] != "resumed" and ends[-1].get("how") != "stopped"
        return History(
            name=self._name,
            source="gpt-train",
            train=train,
            evals=self._tables["eval"].table(),
            layers=self._tables["layers"].table(),
            events=events,
            config=self._config,
            total_steps=total,
            vocab_size=_count(start, "vocab_size"),
            unigram_entropy=_flat(data_check).get("unigram_entropy"),
            finished=ended or (total is not None and last >= total),
        )


def history_of(
    records: Iterable[Record], config: Config | None = None, *, name: str = "run"
) -> History:
    """A History from the lines of a metrics.jsonl of ours."""
    log = HistoryLog(config, name=name)
    for record in records:
        log.add(record)
    return log.history()


def read_run(run: Path) -> History:
    """The History of a run directory of ours; UserError if it is none, or has not begun."""
    if not (run / METRICS_NAME).is_file():
        raise UserError(
            f"{run}: no {METRICS_NAME} there; give a run directory (runs/NAME) or a log file"
        )
    config = load_config(run / "config.yaml") if (run / "config.yaml").is_file() else None
    history = history_of(each_record(run), config, name=run.resolve().name)
    return replace(history, path=run)


def _count(record: Record, name: str) -> int | None:
    """A whole number above 0 of a record, None where there is none."""
    value = record.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _flat(record: Mapping[str, Any], depth: int = 0) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, _NUMBERS):
            flat[name] = value if type(value) is float else _float(value)
        elif isinstance(value, dict) and depth < _DEEPEST:
            inside = _flat(value, depth + 1)
            flat |= {f"{name}/{inner}": number for inner, number in inside.items()}
    return flat


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def finite(steps: Column, values: Column) -> tuple[Column, Column]:
    """Both columns without the rows whose value is not finite."""
    kept = np.isfinite(values)
    return steps[kept], values[kept]
