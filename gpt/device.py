"""Where and in which number format a run computes: device, dtype, compile, seeds, threads.

Every automatic choice comes with the reason, for the user to read. Holds no model code.
"""

import functools
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Below this size, the casts of autocast cost a CPU more than the shorter products save.
_BF16_MIN_PARAMETERS = 2_000_000
# Rough speeds of an eager fp32 step, only to tell a short run from a long one.
_CPU_FLOPS_PER_CORE = 5e10
_CUDA_FLOPS = 5e13
_COMPILE_S = {"cpu": 30, "cuda": 60}
_COMPILED_DIR = "TORCHINDUCTOR_CACHE_DIR"
_COMPILE_PAYS_S = {"cpu": 15 * 60, "cuda": 2 * 60}


def pick_device(name: str, key: str = "train.device") -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` means on this machine.

    Of several GPUs it becomes the current one, which is what torch means by `cuda`: the one whose
    generator is saved, and which is asked for bf16. Raises UserError if it is not there, which
    begins with the `key` that names it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(
            f"{key}: {name!r} is not auto, cpu, cuda, cuda:N (0 to 99) or mps; use auto"
        )
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{key}: mps asked for, this machine has none; use auto or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            built = "" if torch.version.cuda else " (this torch is built without CUDA)"
            raise UserError(
                f"{key}: {name} asked for, this machine has no usable CUDA device{built}; "
                "use auto or cpu"
            )
        if ":" not in name:
            return torch.device("cuda", torch.cuda.current_device())
        if device.index >= count:
            raise UserError(
                f"{key}: {name} asked for, this machine has {count} CUDA device(s), "
                f"cuda:0 to cuda:{count - 1}; use one of them"
            )
        torch.cuda.set_device(device)
    return device


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX).

    Without it the products are emulated, up to a hundred times slower than fp32.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if all(hasattr(torch.cpu, probe) for probe in probes):
        return any(bool(getattr(torch.cpu, probe)()) for probe in probes)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


@functools.cache
def cpu_has_int8() -> bool:
    """Whether this CPU adds up products in int8 by itself (VNNI or AMX), which torch's use."""
    probes = ("_is_vnni_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def pick_dtype(wish: str, device: torch.device, matrix_parameters: int) -> tuple[torch.dtype, str]:
    """The format of the matrix products, and why: `auto`, `fp32`, `bf16` or `fp16`.

    `matrix_parameters` is the number of weights in the model's matrices.
    """
    if wish == "auto":
        return _auto_dtype(device, matrix_parameters)
    dtype = DTYPES[wish]
    if device.type == "cuda" and wish == "bf16" and not _cuda_has_bf16():
        return dtype, "bf16 (asked for; this GPU emulates it, which is slow: fp16 is its format)"
    if device.type == "cpu" and wish == "bf16" and not cpu_has_bf16():
        return dtype, (
            "bf16 (asked for; this CPU has neither AVX512-BF16 nor AMX and emulates it, "
            "which is much slower than fp32)"
        )
    if device.type == "cpu" and wish == "fp16":
        return dtype, "fp16 (asked for; on a CPU it is usually much slower than fp32)"
    return dtype, f"{wish} (asked for)"


def _auto_dtype(device: torch.device, matrix_parameters: int) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if _cuda_has_bf16():
            return torch.bfloat16, "bf16 (auto: the GPU has it)"
        return torch.float16, "fp16 (auto: the GPU has no bf16)"
    if device.type != "cpu":
        return torch.float32, f"fp32 (auto: the safe choice on {device.type})"
    if not cpu_has_bf16():
        return torch.float32, "fp32 (auto: this CPU has neither AVX512-BF16 nor AMX)"
    size = f"{matrix_parameters / 1e6:.1f}M matrix parameters"
    if matrix_parameters < _BF16_MIN_PARAMETERS:
        limit = f"{_BF16_MIN_PARAMETERS / 1e6:.0f}M"
        return torch.float32, f"fp32 (auto: {size}, and bf16 pays on a CPU from {limit})"
    return torch.bfloat16, f"bf16 (auto: the CPU has it, {size})"


def _cuda_has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def pick_compile(wish: str, device: torch.device, training_flops: float) -> tuple[bool, str]:
    """Whether to use torch.compile, and why: `auto`, `on` or `off`.

    `training_flops` is the work of the whole run in floating-point operations; `auto` turns
    compilation on where the run is long enough to earn its cost back. Raises UserError if it is
    asked for and cannot work.
    """
    missing = _compiler_missing(device)
    if wish == "on":
        if missing:
            raise UserError(f"train.compile: on asked for, but {missing}; add it, or use off")
        return True, "on (asked for)"
    if wish == "off":
        return False, "off (asked for)"
    if sys.platform == "win32" or device.type not in _COMPILE_S:
        place = "Windows" if sys.platform == "win32" else device.type
        return False, f"off (auto: not reliable on {place})"
    if missing:
        return False, f"off (auto: {missing})"
    seconds = rough_seconds(device, training_flops)
    assert seconds is not None
    cost, limit = _COMPILE_S[device.type], _COMPILE_PAYS_S[device.type]
    estimate = f"about {_duration(seconds)} of training by a rough estimate"
    if seconds < limit:
        return False, (
            f"off (auto: {estimate}; compiling takes about {cost} s and pays from "
            f"{_duration(limit)})"
        )
    return True, f"on (auto: {estimate}; compiling takes about {cost} s first)"


def rough_seconds(device: torch.device, flops: float) -> float | None:
    """Seconds of so many floating-point operations, several times off at worst; None: no idea."""
    if device.type == "cuda":
        return flops / _CUDA_FLOPS
    if device.type == "cpu":
        return flops / (_CPU_FLOPS_PER_CORE * torch.get_num_threads())
    return None


def _compiler_missing(device: torch.device) -> str:
    """What torch.compile lacks on this machine; empty if nothing."""
    if device.type == "cuda":
        return "" if find_spec("triton") else "the package triton is not installed"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (Python.h) are not installed"
    return ""


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles blocks that are alike, at the first call; a second process finds the code ready.

    One code serves them all. A whole model takes two to three times as long to compile and is no
    quicker: what is left to do outside of its blocks are a few large products.
    """
    keep_compiled()
    for block in blocks:
        block.compile()


def keep_compiled() -> None:
    """Has torch keep compiled code in a folder of the user's own, unless one is named already.

    Its default is a folder in the one for temporary files, which is emptied now and then, and
    which others can make first, with code of theirs in it. Where there is no such folder, torch's
    default stays.
    """
    folder = None if os.environ.get(_COMPILED_DIR) else compiled_folder()
    if folder is not None:
        os.environ[_COMPILED_DIR] = str(folder)


def compiled_folder() -> Path | None:
    """The folder for compiled code, in which nobody but the user can put any; None: there is none.

    It may not be there yet; the one that it is in is.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gpt-train")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or not writable
        return None
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not own or found.st_mode & 0o022 or not os.access(folder, os.W_OK):
        return None
    return folder / "compiled"


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which modules are built with shapes and without numbers, in no time."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Leaves out drawing: on `meta` it takes a millisecond a tensor, and imports the compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def eager(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which a compiled model runs uncompiled, for shapes that come only now and then.

    Each new shape, or a switch of the gradients, would be compiled anew.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if not compiled:  # importing the compiler alone takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context in which matrix products run in `dtype`; fp32 changes nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """The loss scaler, which does something only for fp16: its small gradients would become 0."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def seed_everything(seed: int) -> None:
    """Seeds torch's generators on every device, the only ones that training draws from."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """The state of torch's generators by device type: `cpu`, and the accelerator in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    elif torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Puts back what `rng_state` gave; states of devices that are not here are left out."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


def physical_cores() -> int:
    """Cores that this process may use: hyper-threads count once, container limits count."""
    if not hasattr(os, "sched_getaffinity"):
        return torch.get_num_threads()
    cpus = os.sched_getaffinity(0)
    siblings = {
        _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)
        for cpu in cpus
    }
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    limit = int(quota) / int(period) if quota.isdigit() and period.isdigit() else len(cpus)
    return max(1, min(len(siblings), round(limit)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def set_threads(threads: int | None = None) -> int:
    """Sets how many CPU threads torch uses and says how many.

    Without a number: what OMP_NUM_THREADS says, else the physical cores.
    """
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or physical_cores())
    return torch.get_num_threads()


def busy_warning() -> str | None:
    """A line about other work on the CPU cores, or None while at least half of them are free."""
    if not hasattr(os, "getloadavg"):
        return None
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    cores = physical_cores()
    if load <= cores / 2:
        return None
    return (
        f"the machine is busy: a load of {load:.1f} on {cores} core(s) over the last minute; "
        "other processes will slow this run down"
    )


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished what was queued, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that the run has held: tensors on an accelerator, the process on a CPU.

    0 where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if sys.platform == "win32":
        return 0
    # Linux hands `ru_maxrss` on: a process begins with the peak of the one that started it.
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        if peak := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return 1024 * int(peak[1])
    import resource  # Windows has none

    unit: Literal[1, 1024] = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
