"""A C file of this package as functions to call: compiled when first needed, and kept."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from gpt.device import compiled_folder

_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# The first that the compiler takes: code for the very CPU that it runs on, on all cores or on one.
_WISHES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-mcpu=native",))
_TIMEOUT_S = 60


@cache
def c_library(name: str) -> ctypes.CDLL | str:
    """The functions of `gpt/<name>.c`; or why there are none here, in words.

    The code is kept in the user's own cache, under a name that stands for source, compiler and CPU;
    where there is no such folder, each process makes it anew, in a second. Nothing in it comes from
    a config, a checkpoint or a text.
    """
    compiler = None if sys.platform == "win32" else shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler (cc)"
    source = Path(__file__).with_name(f"{name}.c")
    folder = compiled_folder()
    try:
        if folder is None:
            with tempfile.TemporaryDirectory() as passing:
                return ctypes.CDLL(str(_compiled(compiler, source, Path(passing))))
        folder.mkdir(mode=0o700, exist_ok=True)
        return ctypes.CDLL(str(_compiled(compiler, source, folder)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} made no library of {source.name}: {str(error)[:200]}"


def _compiled(compiler: str, source: Path, folder: Path) -> Path:
    """The library in a folder, made if it is not there yet. Raises OSError, SubprocessError."""
    depends_on = [source.read_text(), os.path.realpath(compiler), _cpu(), *_FLAGS, str(_WISHES)]
    key = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()
    kept = folder / f"{source.stem}-{key[:16]}.so"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(dir=folder) as passing:  # whole before it is at its place
        made = Path(passing, kept.name)
        for wish in _WISHES:
            command = [compiler, *_FLAGS, *wish, str(source), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode == 0:
                made.replace(kept)
                return kept
    lines = done.stderr.decode(errors="replace").splitlines()
    raise OSError(next((line for line in lines if "error" in line), f"exit code {done.returncode}"))


def _cpu() -> str:
    """What tells this CPU from others for which code may have been made in the same folder."""
    kinds = ("model name", "flags", "CPU part", "Features")
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return "\n".join([platform.machine(), *sorted({li for li in lines if li.startswith(kinds)})])
