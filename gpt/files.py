"""Files that are there whole or not at all, even if the power fails; locks; files of strangers."""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: without locks, two writers are the user's own to avoid
    fcntl = None  # type: ignore[assignment]

# Windows has neither: there are no pipes and no links to guard against that a stranger can place.
_NO_WAIT, _NO_LINK = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_NOFOLLOW", 0)
_HOLLOW_BYTES, _HOLLOW_SHARE = 2**28, 16
_NO_SEAL = "0" * 64
_SEAL = re.compile(rb'\{\n "seal": "([0-9a-f]{64})",\n')


class HeldError(Exception):
    """The lock is held; `holder` is the process number that holds it, as text."""

    def __init__(self, holder: str) -> None:
        """Takes what the lock file says of its holder."""
        super().__init__(holder)
        self.holder = holder


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, durable."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Replaces a file whole or not at all: a crash or a full disk leaves the old one or the new.

    What comes in pieces may be read from the old file meanwhile, and is not held together.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    pieces = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.writelines([pieces] if isinstance(pieces, bytes) else pieces)
        sync(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON object as a file that bears the SHA-256 of itself, with zeros in that place, first."""
    text = json.dumps({"seal": _NO_SEAL, **content}, indent=1, ensure_ascii=False) + "\n"
    written = text.encode()
    return written.replace(_NO_SEAL.encode(), hashlib.sha256(written).hexdigest().encode(), 1)


def is_sealed(content: bytes) -> bool | None:
    """Whether a sealed file is as it was written, to the bit; None where there is no seal."""
    found = _SEAL.match(content)
    if found is None:
        return None
    blank = content[: found.start(1)] + _NO_SEAL.encode() + content[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


def check_writable(key: str, path: Path) -> None:
    """Raises UserError where a folder could not be made, without writing anything to find out."""
    there = next(each for each in [path, *path.absolute().parents] if os.path.lexists(each))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {path} cannot be written: {there} forbids it; give another")


def open_plain(path: Path, limit: float = math.inf) -> BinaryIO:
    """Opens a file to read.

    OSError for what is none, such as a pipe, which would never end, and for over `limit` bytes.
    """
    handle = os.open(path, os.O_RDONLY | _NO_WAIT)
    found = os.fstat(handle)
    is_plain = stat.S_ISREG(found.st_mode)
    if is_plain and found.st_size <= limit:
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise _too_large(path, limit) if is_plain else _not_plain(path)


def read_plain(path: Path, limit: int) -> bytes:
    """The content of a file; OSError for what is none, and for more than `limit` bytes."""
    with open_plain(path, limit) as file:  # `read` takes room for all it might read
        content = file.read(os.fstat(file.fileno()).st_size + 1)
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def _not_plain(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a plain file", str(path))


def _too_large(path: Path, limit: float) -> OSError:
    return OSError(errno.EFBIG, f"over {limit:,} bytes, the limit for this file", str(path))


def is_hollow(path: Path) -> bool:
    """Whether a large file is mostly holes, which take no room on a disk and hours to read."""
    found = path.stat()
    stored = getattr(found, "st_blocks", found.st_size // 512) * 512
    return found.st_size > _HOLLOW_BYTES and stored * _HOLLOW_SHARE < found.st_size


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds a lock file, which names this process; the system frees it however the process ends.

    Raises HeldError if another process holds it and `wait` is false, OSError if it is a link: what
    that leads to would be overwritten.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _NO_WAIT, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _not_plain(path)
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                holder = os.read(handle, 20).decode(errors="replace").strip()
                raise HeldError(holder or "unknown") from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)
