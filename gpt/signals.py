"""Ctrl-C and SIGTERM become a flag that long work polls; nothing is cut in the middle."""

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from gpt.errors import Stopped

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first signal only sets `number`; a second one ends the process at once.

    The owner polls `requested`, saves, and then calls `raise_if_requested`.
    """

    def __init__(self, way_on: str = "") -> None:
        """Takes what to say at a second signal, of what is kept and what to type."""
        self.number: int | None = None
        self._way_on = way_on
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        """Installs the handlers."""
        for number in _HANDLED:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Puts back the handlers that were there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def requested(self) -> bool:
        """Whether someone asked for the end. The one place where processes would agree on it."""
        return self.number is not None

    def raise_if_requested(self) -> None:
        """Ends the command with 128 + signal, once everything is saved."""
        if self.number is not None:
            raise Stopped(self.number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.number is not None:
            _say_now(f"{name}: ended at once; {self._way_on}")
            os._exit(128 + number)
        self.number = number
        _say_now(f"{name}: saving after this step; once more ends at once, without saving")


def _say_now(line: str) -> None:
    """To stderr past Python's buffer, in which the signal may have interrupted a print."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
