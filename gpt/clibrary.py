"""A C file of this package as functions to call: compiled when first needed, and kept."""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from gpt.device import compiled_folder

_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT_S = 60
_X86 = ("x86_64", "amd64", "i386", "i686")
# As much of a program as shows whether options are taken: the header and the library of OpenMP too.
_TRIAL = """
#ifdef _OPENMP
#include <omp.h>
int threads(void) { return omp_get_max_threads(); }
#else
int threads(void) { return 1; }
#endif
"""


@cache
def c_library(name: str) -> ctypes.CDLL | str:
    """The functions of `gpt/<name>.c`; or why there are none here, in words.

    The code is kept in the user's own cache, under a name that stands for source, compiler, options
    and CPU; where there is no such folder, each process makes it anew, in a second. Nothing in it
    comes from a config, a checkpoint or a text.
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
    except subprocess.TimeoutExpired:
        return f"{compiler} took over {_TIMEOUT_S} s for {source.name}"
    except OSError as error:
        return f"{compiler} made no library of {source.name}: {str(error)[:200]}"


def _compiled(compiler: str, source: Path, folder: Path) -> Path:
    """The library in a folder, made if it is not there yet. Raises OSError, TimeoutExpired."""
    depends_on = [source.read_text(), os.path.realpath(compiler), _cpu(), *_FLAGS]
    names = {}
    for options in _wishes():
        key = hashlib.sha256("\0".join([*depends_on, *options]).encode()).hexdigest()
        names[options] = f"{source.stem}-{key[:16]}.so"
    for name in names.values():
        if (folder / name).exists():
            return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as passing:  # whole before it is at its place
        made, command = Path(passing, "made.so"), [compiler, *_FLAGS]
        options = _taken(command, Path(passing))
        failure = _failure([*command, *options, str(source), "-o", str(made), "-lm"])
        if failure:
            raise OSError(failure)
        return made.replace(folder / names[options])


def _wishes() -> tuple[tuple[str, ...], ...]:
    """Options, best first: code for the very CPU that it runs on, on all cores or on one.

    On x86 GCC takes -mcpu too, and makes code for any CPU of the last twenty years.
    """
    native = "-march=native" if platform.machine().lower() in _X86 else "-mcpu=native"
    return (native, "-fopenmp"), (native,)


def _taken(command: list[str], folder: Path) -> tuple[str, ...]:
    """The first wish that a compiler takes for a few lines, which fail for no other reason."""
    trial, failure = folder / "trial.c", ""
    trial.write_text(_TRIAL)
    for options in _wishes():
        failure = _failure([*command, *options, str(trial), "-o", str(folder / "trial.so")])
        if not failure:
            return options
    raise OSError(failure)


def _failure(command: list[str]) -> str:
    """Runs a compiler; gives why it failed, "" if it did not. Raises OSError where it was killed.

    In a session of its own: a Ctrl-C is for this process.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
    )
    with process:
        try:
            said = process.communicate(timeout=_TIMEOUT_S)[1].decode(errors="replace")
        except BaseException:
            with suppress(OSError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)  # and the programs that it runs
            raise
    code = process.returncode
    if code == 0:
        return ""
    if code < 0:
        raise OSError(f"it was killed by signal {-code}")
    lines = said.splitlines()
    failure = next((line for line in lines if "error" in line), f"exit code {code}")
    if "signal" in said:  # so compilers say that a program of theirs was killed
        raise OSError(failure)
    return failure


def _cpu() -> str:
    """What tells this CPU from others for which code may have been made in the same folder."""
    kinds = ("model name", "flags", "CPU part", "Features")
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return "\n".join([platform.machine(), *sorted({li for li in lines if li.startswith(kinds)})])
