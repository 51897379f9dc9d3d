"""How torch's threads wait for each other, which must be said before torch is imported."""

import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

_LOOKS, _BETWEEN_S = 5, 0.004
# Turns of a loop; by itself GNU's OpenMP makes 300,000, some milliseconds, before a thread sleeps.
_SHORT_WAIT = "1000"


def wait_briefly_if_busy() -> None:
    """On a machine that is busy, threads that wait give their core to those that are waited for.

    Beside work that keeps all cores busy a training step then takes half to two thirds of the time.
    On an idle machine it would take 5 % longer, so there, and where the user has said how to wait,
    everything stays as it is.
    """
    told = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if not told and others_running() >= (os.cpu_count() or 1) / 2:
        os.environ["GOMP_SPINCOUNT"] = _SHORT_WAIT


def others_running(source: Path = Path("/proc/loadavg")) -> float:
    """Threads that run or wait for a core besides this one, now; 0 where Linux does not tell."""
    looks = [0.0]
    with suppress(OSError, ValueError, IndexError):
        looks = [_running(source) for _ in range(_LOOKS)]
    return max(0.0, statistics.median(looks) - 1)


def _running(source: Path) -> float:
    time.sleep(_BETWEEN_S)
    return float(source.read_text(encoding="ascii").split()[3].partition("/")[0])
