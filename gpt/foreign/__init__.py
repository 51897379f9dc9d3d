"""Logs that other programs wrote, read into a History: what a log is, its content tells.

Nothing that is read is executed. Values are taken as they are: whether a loss is in nats or bits
cannot be known from a log.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

from gpt.errors import UserError
from gpt.foreign.assemble import assemble
from gpt.foreign.console import ConsoleReader
from gpt.foreign.events import MARK, is_event_file, read_events
from gpt.foreign.lines import (
    HEAD_BYTES,
    LINE_CHARACTERS,
    breaks_off,
    check_size,
    read_lines,
    text_encoding,
    unreadable,
)
from gpt.foreign.objects import json_lines, parse, read_document, read_objects
from gpt.foreign.tables import find_layout, read_table
from gpt.history import History, history_of, read_run
from gpt.metrics import METRICS_NAME, read_records

STATE_NAME = "trainer_state.json"
_OUR_KINDS = ("train", "eval", "event", "layers")
_MOST_FILES = 100_000
# Lightning's table, and what W&B keeps of a console.
_KNOWN_NAMES = ("metrics.csv", "output.log")
_LOG_ENDINGS = (".csv", ".tsv", ".jsonl", ".log", ".txt", ".out")


def read_log(path: Path) -> History:
    """The History of a run of ours, or of any log that we know: a file or a folder.

    Known are CSV, JSON lines, console output (nanoGPT's and others'), trainer_state.json and
    TensorBoard's event files. Of a folder, the log in it is taken.

    Raises UserError for what is not a log, holds no loss, or holds several runs.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise UserError(f"{path}: does not exist; give a run directory or a log file")
        if not path.is_file():
            raise unreadable(path, "it is no regular file")
        return _read_file(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from None


def _name(path: Path) -> str:
    return path.resolve().name


def _read_folder(folder: Path) -> History:
    if (folder / METRICS_NAME).is_file():
        return replace(_read_file(folder / METRICS_NAME), name=_name(folder))
    state = _trainer_state(folder)
    if state is not None:
        return replace(_read_file(state), name=_name(folder))
    files = files_below(folder)
    events = [file for file in files if MARK in file.name]
    tables = [file for file in files if file.name in _KNOWN_NAMES]
    if len(tables) == 1:
        return replace(_read_file(tables[0]), name=_name(folder))
    if events:
        return assemble(read_events(events, folder), folder, "tensorboard", _name(folder))
    logs = tables or [file for file in files if file.suffix in _LOG_ENDINGS]
    if len(logs) == 1:
        return replace(_read_file(logs[0]), name=_name(folder))
    if logs:
        names = ", ".join(str(file.relative_to(folder)) for file in logs[:8])
        raise UserError(f"{folder}: {len(logs)} files may be the log; give one of {names}")
    raise unreadable(folder, "no log is in the folder")


def _trainer_state(folder: Path) -> Path | None:
    """The Trainer's state in the folder, or that of its newest checkpoint."""
    if (folder / STATE_NAME).is_file():
        return folder / STATE_NAME
    numbered = [
        (int(file.parent.name.removeprefix("checkpoint-")), file)
        for file in folder.glob(f"checkpoint-*/{STATE_NAME}")
        if file.parent.name.removeprefix("checkpoint-").isdecimal()
    ]
    return max(numbered)[1] if numbered else None


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and in those in it; UserError for more than one run can have."""
    files: list[Path] = []
    for place, _, names in os.walk(folder):
        files += [Path(place) / name for name in names]
        if len(files) > _MOST_FILES:
            raise UserError(
                f"{folder}: more than {_MOST_FILES:,} files are in it; give the folder of one run"
            )
    return sorted(files)


def _read_file(path: Path) -> History:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if _is_ours(path):
        if path.name == METRICS_NAME:
            return read_run(path.parent)
        return replace(history_of(read_records(path), name=_name(path)), path=path)
    check_size(path, path.stat().st_size)
    if is_event_file(head):
        return assemble(read_events([path], path.parent), path, "tensorboard", _name(path))
    encoding = text_encoding(path, head)
    found = _read_json(path, encoding)
    if found is not None:
        return found
    layout = find_layout(read_lines(path, encoding))
    if layout is not None:
        table = read_table(path, encoding, layout)
        table.breaks_off = breaks_off(path)
        return assemble(table, path, "csv", _name(path))
    reader = ConsoleReader()
    sheet = reader.read(read_lines(path, encoding))
    sheet.breaks_off = breaks_off(path)
    return assemble(sheet, path, "nanogpt" if reader.nanogpt else "console", _name(path))


def _is_ours(path: Path) -> bool:
    """Whether the file begins as a log of ours, which may be longer, and torn in other ways."""
    with path.open("rb") as file:
        head = file.read(2 * LINE_CHARACTERS).decode("utf-8-sig", errors="replace")
    found = map(parse, islice((line for line in head.split("\n") if line.strip()), 2))
    first = next((value for value in found if isinstance(value, dict)), {})
    return first.get("kind") in _OUR_KINDS


def _read_json(path: Path, encoding: str) -> History | None:
    """The History of a file that is JSON by its first lines; None for another.

    Console lines may begin with a bracket or a brace too: `[12:00:01] step 5`, `{'loss': 3.2}`.
    """
    written = (line for line in read_lines(path, encoding) if line.strip())
    first, second = (next(written, "").strip() for _ in range(2))
    if not first.startswith(("{", "[")):
        return None
    value = parse(first)
    if second and any(isinstance(line, dict) for line in (value, parse(second))):
        sheet = read_objects(json_lines(read_lines(path, encoding)))
        return assemble(sheet, path, "jsonl", _name(path))
    whole = first in ("{", "[") or first[1:].lstrip().startswith(('"', "{", "["))
    if value is None and not whole:
        return None
    sheet, source = read_document(path, encoding)
    return assemble(sheet, path, source, _name(path))
