"""JSON: one object a line, an array of them, the state of Hugging Face's Trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt.foreign.lines import parse_number, unreadable
from gpt.foreign.sheet import Sheet

# A document is read as a whole, which takes many times its size.
MOST_DOCUMENT_BYTES = 64 * 2**20
# What each of its objects and lists takes; a log of 64 MiB has some hundred thousand.
MOST_CONTAINERS = 3_000_000
_DEEPEST = 8
# The Trainer's last line sums up the whole training, its first may be an evaluation before it.
_SUMMARY = "train_runtime"


def parse(text: str) -> Any:  # noqa: ANN401 (whatever JSON holds)
    """The value that a text is as JSON; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_objects(objects: Iterable[Mapping[str, Any]]) -> Sheet:
    """Takes the numbers of objects, one row each; inner ones are named `outer/inner`."""
    sheet = Sheet()
    for each in objects:
        if _SUMMARY in each:
            continue
        row = list(_numbers(each))
        if row:
            sheet.add(row)
            _facts(sheet, each)
    return sheet


def _facts(sheet: Sheet, record: Mapping[str, Any]) -> None:
    size = record.get("vocab_size")
    if isinstance(size, int):
        sheet.note_vocabulary(size)


def _numbers(
    value: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, float]]:
    for name, inner in value.items():
        spelled = f"{prefix}{name}"
        if isinstance(inner, Mapping):
            if depth < _DEEPEST:
                yield from _numbers(inner, f"{spelled}/", depth + 1)
        elif isinstance(inner, int | float):
            try:
                yield spelled, float(inner)
            except OverflowError:  # an integer of hundreds of digits
                continue
        elif isinstance(inner, str) and len(inner) <= 40:
            number = parse_number(inner)
            if number is not None:
                yield spelled, number


def json_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one a line; torn and other lines are left out."""
    for line in lines:
        if line.lstrip().startswith("{"):
            found = parse(line)
            if isinstance(found, dict):
                yield found


def read_document(path: Path, encoding: str) -> tuple[Sheet, str]:
    """The numbers of a file that is one JSON value, and what wrote it.

    Raises UserError for one that holds no log.
    """
    size = path.stat().st_size
    if size > MOST_DOCUMENT_BYTES:
        raise unreadable(
            path,
            f"one JSON value of {size / 2**20:,.0f} MiB, at most {MOST_DOCUMENT_BYTES >> 20} MiB "
            "are read at once (files of one object a line may be longer)",
        )
    text = path.read_text(encoding=encoding, errors="replace")
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise unreadable(path, f"more than {MOST_CONTAINERS:,} lists and objects are in it")
    value = parse(text)
    del text
    if isinstance(value, dict) and isinstance(value.get("log_history"), list):
        return _trainer_state(value), "trainer_state"
    if isinstance(value, dict):
        return read_objects(_rows_of(value)), "jsonl"
    if isinstance(value, list):
        if value and all(isinstance(each, list) and len(each) == 3 for each in value):
            # TensorBoard's download as JSON: [time, step, value].
            sheet = read_objects({"step": each[1], "loss": each[2]} for each in value)
            sheet.notes.append(
                "the file has values without a name: they were taken as the training loss"
            )
            return sheet, "jsonl"
        return read_objects(each for each in value if isinstance(each, dict)), "jsonl"
    raise unreadable(path, "it begins like JSON and is none, or breaks off")


def _rows_of(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An object of columns, `{"loss": [3.1, 2.9]}`, as rows; any other object as the only row."""
    columns = {
        name: list(inner.values()) if isinstance(inner, dict) else inner
        for name, inner in value.items()
        if isinstance(inner, list | dict)
    }
    # pandas writes {"loss": {"0": 3.1, "1": 2.9}}.
    columns = {
        name: cells
        for name, cells in columns.items()
        if cells and not any(isinstance(cell, dict | list) for cell in cells)
    }
    length = max((len(cells) for cells in columns.values()), default=0)
    if length < 2:
        yield dict(value)
        return
    for row in range(length):
        yield {name: cells[row] for name, cells in columns.items() if row < len(cells)}


def _trainer_state(state: Mapping[str, Any]) -> Sheet:
    """The state that Hugging Face's Trainer saves beside each checkpoint."""
    sheet = read_objects(each for each in state["log_history"] if isinstance(each, dict))
    total = state.get("max_steps")
    if isinstance(total, int | float) and not isinstance(total, bool):
        sheet.note_total(total)
    return sheet
