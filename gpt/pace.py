"""Steps that take far longer than the others: told when they are over, and while they go on."""

import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

SLOW, SLOW_WINDOW = 10, 20  # times the median, of so many steps before it
LEAST_S, LEAST_HANG_S = 1.0, 5.0
PACKAGE = Path(__file__).parent


class SlowSteps:
    """Notices a step that takes SLOW times the median of those before it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._seconds: list[float] = []
        self._told = -math.inf

    @property
    def usual_s(self) -> float | None:
        """The median; None before enough is known."""
        return statistics.median(self._seconds) if len(self._seconds) == SLOW_WINDOW else None

    def add(self, seconds: float, step: int) -> str:
        """A warning about a step that took `seconds`; empty if there is none, or was one lately."""
        median = self.usual_s
        self._seconds = [*self._seconds, seconds][-SLOW_WINDOW:]
        if median is None or step - self._told < SLOW_WINDOW:
            return ""
        if seconds < SLOW * median or seconds < LEAST_S:
            return ""
        self._told = step
        return f"step {step:,} took {seconds:.1f} s, {seconds / median:.0f} times the median"


class HangWatch:
    """Speaks up while a step goes on and on: one that never ends could not tell of itself.

    A thread looks at the clock now and then; it reads one attribute, and changes nothing.
    """

    def __init__(self, tell: Callable[[str], None], every_s: float = 1.0) -> None:
        """`tell` prints a line; it is called from another thread."""
        self._tell, self._every_s = tell, every_s
        self._now: tuple[int, float, float] | None = None  # step, its begin, the usual seconds
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._owner = threading.get_ident()

    def begin(self, step: int, usual_s: float | None) -> None:
        """A step begins that usually takes so long; None: nobody knows yet."""
        self._now = None if usual_s is None else (step, time.monotonic(), usual_s)
        if self._now is not None and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The step is over."""
        self._now = None

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        seen, limit = None, 0.0
        while not self._over.wait(self._every_s):
            now = self._now
            if now is None:
                continue
            step, begun, usual = now
            if now is not seen:
                seen, limit = now, max(LEAST_HANG_S, SLOW * usual)
            passed = time.monotonic() - begun
            if passed >= limit:
                limit = 4 * passed  # a hang is told now and then, not all the time
                self._tell(
                    f"warning: step {step:,} has been going on for {passed:.0f} s, "
                    f"{passed / usual:,.0f} times the median{self._place()}; look with: "
                    f"py-spy dump --pid {os.getpid()}, and top (or nvidia-smi)"
                )

    def _place(self) -> str:
        """Where in this package the owner's thread is."""
        frame = sys._current_frames().get(self._owner)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                name = path.relative_to(PACKAGE.parent)
                return f", in {frame.f_code.co_name} ({name}:{frame.f_lineno})"
            frame = frame.f_back
        return ""
