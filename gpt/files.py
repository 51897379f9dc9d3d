"""Files that are there whole or not at all, even if the power fails; and locks on folders."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: without locks, two writers are the user's own to avoid
    fcntl = None  # type: ignore[assignment]


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


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces a file whole or not at all: a crash leaves the old content or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds a lock file, which names this process; the system frees it however the process ends.

    Raises HeldError if another process holds it and `wait` is false.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
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
