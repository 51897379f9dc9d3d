"""What the machine does while a run trains: memory, its own and others' share of the cores."""

import os
import sys
import time
from pathlib import Path

import torch

from gpt.device import peak_memory_bytes

Reading = dict[str, float | int | None]


class MachineMeter:
    """Readings since the one before; costs some microseconds each."""

    def __init__(self, device: torch.device) -> None:
        """Starts the clocks."""
        self._device = device
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._faults, self._busy = _major_faults(), _busy_seconds()

    def read(self) -> Reading:
        """Memory, and what happened since the last reading.

        `memory_bytes`: the most held so far; `cpu_share`: this process's CPU seconds for each
        second and thread; `others_share`: what other processes took of all cores; `major_faults`:
        pages fetched from disk, as when swapping. None where the system does not tell.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        faults, busy = _major_faults(), _busy_seconds()
        passed, own = max(1e-9, wall - self._wall), cpu - self._cpu
        others = None
        if busy is not None and self._busy is not None:
            cores = os.cpu_count() or 1
            others = round(min(1.0, max(0.0, (busy - self._busy - own) / passed / cores)), 3)
        reading: Reading = {
            "memory_bytes": peak_memory_bytes(self._device) or None,
            "cpu_share": round(own / passed / torch.get_num_threads(), 3),
            "others_share": others,
            "major_faults": None if faults is None else faults - (self._faults or 0),
        }
        self._wall, self._cpu, self._faults, self._busy = wall, cpu, faults, busy
        return reading


def _major_faults() -> int | None:
    if sys.platform == "win32":
        return None
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _busy_seconds() -> float | None:
    """CPU seconds that all processes of the machine have used, on Linux."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as file:
            fields = file.readline().split()
    except OSError:
        return None
    if not fields or fields[0] != "cpu" or len(fields) < 9:
        return None
    user, nice, system, _idle, _wait, irq, soft_irq, _steal = map(int, fields[1:9])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")
