"""How much memory is free on a device, within the limits of the process and its container."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


class Room(NamedTuple):
    """Bytes that are free, and those that swapping would add to them."""

    free: float
    swap: float = 0


def room(device: torch.device) -> Room | None:
    """The memory that a run may take on a device; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Room(torch.cuda.mem_get_info(device)[0] + kept)
    if device.type == "mps":
        return Room(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    found = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" not in found:
        return None
    free = min([found["MemAvailable"], *_limits()])
    swap = found.get("SwapFree", 0) if free == found["MemAvailable"] else 0
    return Room(free, swap)


def _limits() -> Iterator[float]:
    """What is left of the limits of this process and of its container."""
    import resource  # Windows has none, and no /proc/meminfo either

    mine = _numbers(Path("/proc/self/status"))
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in mine:
            yield max(0.0, most - mine[used])
    for folder, limit_name, used_name in _groups():
        with suppress(OSError, ValueError):  # no such limit
            allowed = int((folder / limit_name).read_text())
            cached = _numbers(folder / "memory.stat").get("inactive_file", 0)
            yield max(0.0, allowed - int((folder / used_name).read_text()) + cached)


def _groups() -> Iterator[tuple[Path, str, str]]:
    """The control groups that this process is in, innermost first, and their files."""
    root, own = Path("/sys/fs/cgroup"), ""
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "")
    inner = Path(own.strip("/"))
    for folder in [inner, *inner.parents]:
        yield root / folder, "memory.max", "memory.current"
    yield root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"


def _numbers(path: Path) -> dict[str, float]:
    """Lines such as `MemAvailable:  12 kB` as bytes by name."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {
        parts[0]: float(parts[1]) * (1024 if parts[2:] == ["kB"] else 1)
        for parts in words
        if len(parts) > 1 and parts[1].isdigit()
    }
