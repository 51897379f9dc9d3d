"""Text files as lines of bounded length, whatever they hold; and numbers as programs print them."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from pathlib import Path

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
    """How the file whose first bytes are given is written; UserError if it is no text."""
    for mark, encoding in _BOMS.items():
        if head.startswith(mark):
            return encoding
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):
        raise unreadable(path, "it is compressed, unpack it first")
    if head.startswith(b":W&B"):
        raise unreadable(path, "it is W&B's own file, give files/output.log beside it, or a CSV")
    text = head.decode("utf-8", errors="replace")
    odd = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\x1b\b\f") for c in text)
    if b"\0" in head or odd > 0.1 * len(text):
        raise unreadable(path, "it is binary")
    return "utf-8"


def read_lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines without their ends; a carriage return ends one too, as progress bars use it."""
    with path.open(encoding=encoding, errors="replace", newline=None) as file:
        whole = True
        while line := file.readline(LINE_CHARACTERS):
            ends = line.endswith("\n")
            if whole:
                yield line.rstrip("\n")
            whole = ends


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
