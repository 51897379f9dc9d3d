"""CSV: with commas, semicolons or tabs, of Lightning, of W&B's and TensorBoard's downloads."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gpt.foreign.lines import comma_in, parse_number, read_lines
from gpt.foreign.names import meaning
from gpt.foreign.sheet import Sheet

_DELIMITERS = ("\t", ";", ",")
_MOST_CELLS = 65_536
# What W&B adds to a metric when it draws fewer points than there are.
_AGGREGATE = re.compile(r".+__(MIN|MAX|STD|STDERR|AVG|VAR)")
_POINTED = re.compile(r"\d{1,3}(?:\.\d{3})+")
_COMMA = re.compile(r"\d,\d")
_LOSSES = ("loss", "val_loss", "ppl", "val_ppl", "val_bpb")
# What is hardly ever a thousand, and what is never a fraction.
_SMALL = {"loss", "val_loss", "train_loss", "bpb", "val_bpb", "lr", "grad_norm", "epoch", "mfu"}
_COUNTS = {"step", "tokens", "total_steps"}


@dataclass(frozen=True)
class Layout:
    """How a table is written: the line that the header stands in, its cells, what parts them."""

    at: int
    header: tuple[str, ...]
    delimiter: str


def find_layout(lines: Iterable[str]) -> Layout | None:
    """The layout of the table that these first lines begin, None if it is no table."""
    first = [(at, line) for at, line in enumerate(islice(lines, 50)) if line.strip()]
    # A comment may stand above the header, and the header may be written as one.
    while len(first) > 1 and first[0][1].startswith("#") and first[1][1].startswith("#"):
        first.pop(0)
    if len(first) < 2 or len(first[0][1]) > 2**20:
        return None
    (at, header), rows = first[0], [line for _, line in first[1:]]
    header = header.lstrip("#").strip(" \ufeff")
    delimiter = max(_DELIMITERS, key=header.count)
    if not header.count(delimiter):
        delimiter = ","
    names = tuple(cell.strip() for cell in _split(header, delimiter))
    known = any(meaning(name) or _of_run(name) or name == "Value" for name in names)
    numeric = sum(parse_number(name) is not None for name in names)
    if not known or numeric or len(names) > _MOST_CELLS:
        return None
    return Layout(at, names, delimiter) if _are_rows(rows, delimiter, len(names)) else None


def _are_rows(lines: list[str], delimiter: str, width: int) -> bool:
    """Whether any line has as many cells as the header, with a number among them."""
    for line in lines:
        cells = _split(line, delimiter)
        if len(cells) == width and any(
            parse_number(cell, decimal_comma=True) is not None for cell in cells
        ):
            return True
    return False


def _split(line: str, delimiter: str) -> list[str]:
    """The cells of one line; a quote that never ends does not swallow the lines after it."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:  # a cell longer than the module allows, or a stray return
        return line.replace('"', "").split(delimiter)


def read_table(path: Path, encoding: str, layout: Layout) -> Sheet:
    """Takes the numbers of a table; the file's name may tell what its values are."""
    sheet = Sheet()
    picked = _columns(layout.header, sheet, path.name)
    written = _find_marks(read_lines(path, encoding), layout, picked)
    for line in islice(read_lines(path, encoding), layout.at + 1, None):
        if not line.strip():
            continue
        cells = _split(line, layout.delimiter)
        row = []
        for place, spelled in picked:
            if place >= len(cells):
                break
            number = written.number(place, cells[place])
            if number is not None:
                row.append((spelled, number))
        if row:
            sheet.add(row)
    return sheet


@dataclass(frozen=True)
class _Marks:
    """How a table writes numbers: columns, by place, in which a comma or a point means the other.

    Attributes:
        decimal: a comma stands before decimals: `4,25`.
        pointed: points part thousands: `1.000`.
    """

    decimal: set[int]
    pointed: set[int]

    def number(self, place: int, cell: str) -> float | None:
        """The number in a cell of the column at `place`."""
        if place in self.pointed and _POINTED.fullmatch(cell.strip(' "')):
            cell = cell.replace(".", "")
        return parse_number(cell, decimal_comma=place in self.decimal)


def _find_marks(lines: Iterator[str], layout: Layout, picked: list[tuple[int, str]]) -> _Marks:
    """Looks through a table for what its commas and points mean.

    Where a column has only numbers like 1,234 its name decides: a loss is no thousand. Of others
    it is what it is elsewhere in the file.
    """
    told: dict[int, set[str | None]] = {place: set() for place, _ in picked}
    in_quotes = layout.delimiter == ","
    for line in islice(lines, layout.at + 1, None):
        if (not in_quotes or '"' in line) and _COMMA.search(line):
            cells = _split(line, layout.delimiter)
            for place in told:
                if place < len(cells) and "," in cells[place]:
                    told[place].add(comma_in(cells[place]))
    sure = {place for place, kinds in told.items() if "decimal" in kinds}
    unsure = {
        place for place, kinds in told.items() if "either" in kinds and "thousands" not in kinds
    }
    named = {place: found.name for place, cell in picked if (found := meaning(cell))}
    small = {place for place, name in named.items() if name in _SMALL or name.startswith("lrs/")}
    counts = {place for place, name in named.items() if name in _COUNTS}
    decimal = sure | (unsure & small) | (unsure - counts if sure else set())
    return _Marks(decimal, counts - decimal if decimal else set())


def _columns(header: tuple[str, ...], sheet: Sheet, name: str) -> list[tuple[int, str]]:
    """Places and names of the columns to read."""
    if set(header) >= {"Step", "Value"}:
        return [(header.index("Step"), "step"), (header.index("Value"), _told_by(name, sheet))]
    of_runs = [(place, *found) for place, cell in enumerate(header) if (found := _of_run(cell))]
    if not of_runs:
        return [(place, cell) for place, cell in enumerate(header) if cell]
    runs = list(dict.fromkeys(run for _, run, _ in of_runs))
    with_loss = {
        run for _, run, cell in of_runs if (known := meaning(cell)) and known.name in _LOSSES
    }
    taken = next((run for run in runs if run in with_loss), runs[0])
    if len(runs) > 1:
        others = ", ".join(repr(run) for run in runs if run != taken)
        sheet.notes.append(
            f"{len(runs):,} runs are in the file: this is {taken!r}; "
            f"left out are {others[:300]}, which need files of their own"
        )
    shared = [
        (place, cell)
        for place, cell in enumerate(header)
        if cell and _of_run(cell) is None and not _AGGREGATE.fullmatch(cell)
    ]
    return shared + [(place, cell) for place, run, cell in of_runs if run == taken]


def _of_run(cell: str) -> tuple[str, str] | None:
    """Run and metric of a column of W&B's chart download, `run - train/loss`."""
    run, parts, metric = cell.rpartition(" - ")
    if not parts or not run or _AGGREGATE.fullmatch(metric) or meaning(metric) is None:
        return None
    return run, metric


def _told_by(name: str, sheet: Sheet) -> str:
    """What the values of TensorBoard's download are: the file is named `run-NAME-tag-TAG.csv`."""
    tag = re.sub(r"\.\w+$", "", name.rpartition("tag-")[2])
    known = meaning(tag)
    if known is not None and known.name != "step":
        return tag
    sheet.notes.append(
        "the file has values without a name: they were taken as the training loss; "
        "a file named tag-val_loss.csv would be the validation's"
    )
    return "loss"
