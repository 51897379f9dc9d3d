"""TensorBoard folders, read with the package `tensorboard`."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt.errors import UserError
from gpt.files import open_plain
from gpt.foreign.lines import check_size, unreadable
from gpt.foreign.sheet import Sheet

MARK = "tfevents"
# The first record of an event file says its version.
_VERSION = b"brain.Event:"
_LOSSES = ("loss", "val_loss", "ppl", "val_ppl", "val_bpb")
_HEADER_BYTES, _CHECKSUM_BYTES = 12, 4
_MOST_RECORD_BYTES = 2**24  # longer ones are pictures, sounds, graphs
# TensorFlow's numbers of the types, where a tensor keeps such values, and their layout as bytes.
_KINDS = {1: ("float_val", "<f"), 2: ("double_val", "<d"), 3: ("int_val", "<i")}
_KINDS |= {9: ("int64_val", "<q"), 19: ("half_val", "<e")}
_PHASES = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")


def is_event_file(head: bytes) -> bool:
    """Whether a file that begins so holds TensorBoard's events."""
    return _VERSION in head[:64] and head[4:8] == b"\0\0\0\0"


def read_events(files: list[Path], root: Path) -> Sheet:
    """The scalars of one run from its event files, which may lie in folders below `root`.

    Raises UserError if there are several runs, if the package is not installed, and for files that
    hold no events.
    """
    check_size(root, sum(file.stat().st_size for file in files))
    runs: dict[Path, Sheet] = {}
    for file in sorted(files, key=lambda file: (file.parent, _written(file), file.name)):
        folder = file.parent
        for step, tag, value in _scalars(file):
            run, spelled = _placed(folder, tag, root)
            runs.setdefault(run, Sheet()).add([("step", step), (spelled, value)])
    learned = {run: sheet for run, sheet in runs.items() if any(map(sheet.named, _LOSSES))}
    if len(learned) > 1:
        names = ", ".join(str(run.relative_to(root)) for run in sorted(learned))
        raise UserError(f"{root}: {len(learned)} runs are in it; give one of {names[:400]}")
    if learned:
        return next(iter(learned.values()))
    if not runs:
        raise unreadable(root, "the event files hold no numbers")
    return max(runs.values(), key=lambda sheet: sheet.rows)


def _written(file: Path) -> str:
    """The time in an event file's name, `events.out.tfevents.TIME.HOST`."""
    return file.name.partition(f"{MARK}.")[2].partition(".")[0].rjust(20, "0")


def _placed(folder: Path, tag: str, root: Path) -> tuple[Path, str]:
    """The run that a tag belongs to, and the tag's whole name.

    Some write one run into several folders: `train/` and `validation/`, or, as `add_scalars` does,
    one for each line of a chart, named `TAG_LINE`.
    """
    if folder == root:
        return root, tag
    if folder.name.lower() in _PHASES:
        return folder.parent, f"{folder.name}/{tag}"
    if folder.name.startswith(tag.replace("/", "_") + "_"):
        return folder.parent, folder.name
    return folder, tag


def _scalars(file: Path) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of each scalar, in the order written; a torn end is left out."""
    with _quiet():
        try:
            from google.protobuf.message import DecodeError
            from tensorboard.compat.proto.event_pb2 import Event
        except ImportError:
            raise UserError(
                f"{file}: TensorBoard's events are read with the package tensorboard, which is not "
                'installed; pip install "gpt-train[track]"'
            ) from None
    for record in _records(file):
        try:
            event = Event.FromString(record)
        except DecodeError:
            return
        for value in event.summary.value:
            number = _scalar(value)
            if number is not None:
                yield event.step, value.tag, number


def _records(file: Path) -> Iterator[bytes]:
    """The records as they are framed: length, its checksum, content, its checksum.

    The checksums are not looked at: in Python they take longer than all the rest, and content that
    is damaged does not parse.
    """
    with open_plain(file) as handle:
        left = file.stat().st_size
        while len(header := handle.read(_HEADER_BYTES)) == _HEADER_BYTES:
            length = int.from_bytes(header[:8], "little")
            left -= _HEADER_BYTES + length + _CHECKSUM_BYTES
            if left < 0:
                return
            if length <= _MOST_RECORD_BYTES:
                yield handle.read(length)
                handle.seek(_CHECKSUM_BYTES, os.SEEK_CUR)
            else:
                handle.seek(length + _CHECKSUM_BYTES, os.SEEK_CUR)


def _scalar(value: Any) -> float | None:  # noqa: ANN401 (a protocol buffer)
    """The number of one summary, which newer writers keep as a tensor without dimensions."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    tensor = value.tensor
    if kind != "tensor" or tensor.tensor_shape.dim or tensor.dtype not in _KINDS:
        return None
    field, layout = _KINDS[tensor.dtype]
    if len(tensor.tensor_content) == struct.calcsize(layout):
        return float(struct.unpack(layout, tensor.tensor_content)[0])
    numbers = getattr(tensor, field)
    return float(numbers[0]) if len(numbers) == 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """TensorBoard says on stderr that TensorFlow is not installed, which nobody needs here."""
    logger = logging.getLogger("tensorboard")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
