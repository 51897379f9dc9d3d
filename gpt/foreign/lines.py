"""Text files as lines of bounded length, whatever they hold; and numbers as programs print them."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gpt.errors import UserError

MOST_BYTES = 512 * 2**20
# Longer lines are cut: no program writes one record of a megabyte.
LINE_CHARACTERS = 2**20
HEAD_BYTES = 2**16
READABLE = (
    "a run directory, CSV, JSON lines, the console output of a training program, "
    "trainer_state.json, a TensorBoard folder"
)

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NAMED = {
    "nan": math.nan,
    "inf": math.inf,
    "+inf": math.inf,
    "-inf": -math.inf,
    "infinity": math.inf,
    "+infinity": math.inf,
    "-infinity": -math.inf,
}
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:[,_]\d{3})+(?:\.\d*)?")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+(?:[eE][-+]?\d+)?)")


def unreadable(path: Path, why: str) -> UserError:
    """The one error for what is not a log."""
    return UserError(f"{path}: not a log that can be read: {why}; readable are {READABLE}")


def check_size(path: Path, size: int) -> None:
    """Raises UserError for an empty log, and for one larger than is read."""
    if size == 0:
        raise unreadable(path, "it is empty")
    if size > MOST_BYTES:
        raise UserError(
            f"{path}: {size / 2**20:,.0f} MiB, at most {MOST_BYTES >> 20} MiB are read; "
            "give a part of it, or a log with fewer columns"
        )


def text_encoding(path: Path, head: bytes) -> str:
    """How the file whose first bytes are given is written; UserError if it is no text.

    Zeros at its end are what a crash leaves of lines that the disk had no time to take.
    """
    for mark, encoding in _BOMS.items():
        if head.startswith(mark):
            return encoding
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):
        raise unreadable(path, "it is compressed, unpack it first")
    if head.startswith(b":W&B"):
        raise unreadable(path, "it is W&B's own file, give files/output.log beside it, or a CSV")
    head = head.rstrip(b"\0")
    text = head.decode("utf-8", errors="replace")
    odd = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\x1b\b\f") for c in text)
    if not head or b"\0" in head or odd > 0.1 * len(text):
        raise unreadable(path, "it is binary")
    return "utf-8"


def read_lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines without their ends; a carriage return ends one too, as progress bars use it.

    Zeros around a line are left out, see `text_encoding`.
    """
    with path.open(encoding=encoding, errors="replace", newline=None) as file:
        whole = True
        while line := file.readline(LINE_CHARACTERS):
            ends = line.endswith("\n")
            if whole:
                yield line.rstrip("\n").strip("\0")
            whole = ends


def breaks_off(path: Path) -> bool:
    """Whether the file ends in the middle of a line, as one that is being written may."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - HEAD_BYTES))
        return not file.read().rstrip(b"\0").endswith((b"\n", b"\r"))


def comma_in(text: str) -> Literal["decimal", "thousands", "either"] | None:
    """What the comma in a number stands before, as far as the number alone tells; None: no such."""
    text = text.strip().strip("\"'%").strip()
    grouped = _GROUPED.fullmatch(text) is not None
    if not _DECIMAL_COMMA.fullmatch(text):
        return "thousands" if grouped and "," in text else None
    return "either" if grouped and not text.lstrip("+-").startswith("0,") else "decimal"


def parse_number(text: str, *, decimal_comma: bool = False) -> float | None:
    """The number that a text is, `nan` and `inf` included; None for an empty or other text."""
    text = text.strip().strip("\"'")
    try:
        return float(text)
    except ValueError:
        pass
    named = _NAMED.get(text.lower())
    if named is not None or not text or len(text) > 40:
        return named
    if decimal_comma and (parts := _DECIMAL_COMMA.fullmatch(text)):
        return float(f"{parts[1]}.{parts[2]}")
    if _GROUPED.fullmatch(text):
        return float(text.replace(",", "").replace("_", ""))
    if text.endswith("%"):
        return parse_number(text[:-1], decimal_comma=decimal_comma)
    return None
