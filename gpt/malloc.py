"""What glibc's malloc does with freed memory; nothing on other systems."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h: options of mallopt, and the value of the first one that means never.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _NEVER = -1, -3, -4, -1
# As glibc begins, and where it ends after it freed large blocks (man mallopt).
_FIRST = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**17, _TRIM_THRESHOLD: 2**17}
_LAST = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_KEEPS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER}

_lasting = _LAST


def keep_freed_memory(keep: bool = True) -> None:
    """Lets malloc keep the memory of a step for the next one, instead of giving it back each time.

    Tensors of some megabytes are otherwise mapped and unmapped at every step, and a virtual machine
    takes up to 0.4 ms for each megabyte of fresh memory: GPT-2 124M on AMX a fifth of its step, a
    small model 5-10 %. The most that a process holds grows by 5 %, and by a tenth where activations
    are checkpointed: gradients settle in the holes between them. For steps that are to be small
    before they are quick, `keep` is False: every freed block of 128 KiB or more goes back at once.
    """
    global _lasting
    _lasting = _KEEPS if keep else _FIRST
    _set(_lasting)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within it, freed blocks of 128 KiB or more go back to the system at once.

    For work whose blocks are of many sizes: malloc raises its threshold with each larger block, the
    holes in its heap then fit less and less of what comes, and the heap grows with the text.
    What `keep_freed_memory` said last, in whichever thread, holds again at the end.
    """
    _set(_FIRST)
    try:
        yield
    finally:
        _set(_lasting)


def _set(options: dict[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
