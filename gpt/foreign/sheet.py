"""The numbers of a log as its program wrote them: cells by row and column, kept compactly."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gpt.foreign.names import Meaning, meaning
from gpt.history import Column

_MOST_COLUMNS = 4096
_MOST_UNKNOWN = 200
_MOST_VOCABULARY = 10**8
_LARGEST_STEP = 1e15


@dataclass
class Cells:
    """One column: which rows have a value, ascending, and the values."""

    spelled: str
    meaning: Meaning
    order: int
    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    @property
    def row_numbers(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The rows as numpy has them."""
        return np.array(self.rows, np.int64)

    @property
    def numbers(self) -> Column:
        """The values in our unit."""
        return np.array(self.values, np.float64) * self.meaning.scale


class Sheet:
    """What a reader takes from a log. Columns whose names mean nothing to us are only counted.

    Attributes:
        rows: how many rows there are.
        columns: by spelling.
        unknown: names of columns that were left out, the first of them.
        totals: for a column of steps, the last `m` of its `n/m`.
        total_steps: the planned length, where a line says it.
        vocab_size: where a line says it.
        tokens_per_step: where a line says it.
        breaks_off: whether the log ends in the middle of a line.
        notes: what the reader has to tell.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.rows = 0
        self.columns: dict[str, Cells] = {}
        self.unknown: dict[str, None] = {}
        self.totals: dict[str, int] = {}
        self.total_steps: int | None = None
        self.vocab_size: int | None = None
        self.tokens_per_step: int | None = None
        self.breaks_off = False
        self.notes: list[str] = []

    def add(self, cells: Iterable[tuple[str, float]]) -> None:
        """Appends a row. Of two cells of one column the last one counts."""
        for spelled, value in cells:
            column = self.columns.get(spelled) or self._new(spelled, meaning(spelled))
            if column is not None:
                self._put(column, value)
        self.rows += 1

    def add_meant(self, spelled: str, meant: Meaning, value: float) -> None:
        """Puts a cell into the row that the next `add` ends, of a column whose meaning is told."""
        column = self.columns.get(spelled) or self._new(spelled, meant)
        if column is not None:
            self._put(column, value)

    def _put(self, column: Cells, value: float) -> None:
        if column.rows and column.rows[-1] == self.rows:
            column.values[-1] = value
        else:
            column.rows.append(self.rows)
            column.values.append(value)

    def _new(self, spelled: str, meant: Meaning | None) -> Cells | None:
        if meant is None or len(self.columns) >= _MOST_COLUMNS:
            if len(self.unknown) < _MOST_UNKNOWN:
                self.unknown[spelled[:80]] = None
            return None
        self.columns[spelled] = Cells(spelled, meant, len(self.columns))
        return self.columns[spelled]

    def named(self, name: str) -> list[Cells]:
        """The columns that mean `name`, the best first; those with few of the values are last."""
        found = [column for column in self.columns.values() if column.meaning.name == name]
        fullest = max((len(column.rows) for column in found), default=0)

        def preference(column: Cells) -> tuple[bool, int, int]:
            return len(column.rows) * 10 < fullest, column.meaning.rank, column.order

        return sorted(found, key=preference)

    def note_vocabulary(self, size: float) -> None:
        """Books the number of ids, if it can be one."""
        if 1 < size <= _MOST_VOCABULARY:
            self.vocab_size = int(size)

    def note_total(self, steps: float) -> None:
        """Books the planned length, if it can be one."""
        if 0 < steps <= _LARGEST_STEP:
            self.total_steps = int(steps)
