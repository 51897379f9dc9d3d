"""A C file of this package as functions to call: compiled when first needed, and kept."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from gpt.device import compiled_folder
from gpt.files import read_plain, sync

_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT_S, _MOST_BYTES = 60, 2**24
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
    and CPU, and for its own content: what is damaged is made anew. Where there is no such folder,
    each process makes its own, in a second or two. Nothing in it comes from a config, a checkpoint
    or a text.
    """
    wish = os.environ.get("CC", "").strip()
    compiler = [] if sys.platform == "win32" else _found(wish or "cc")
    if not compiler:
        return f"there is no C compiler: {f'CC={wish!r}' if wish else 'cc'} is not found"
    source = Path(__file__).with_name(f"{name}.c")
    folder = compiled_folder()
    try:
        if folder is None:
            with tempfile.TemporaryDirectory() as passing:
                return _library(compiler, source, Path(passing))
        folder.mkdir(mode=0o700, exist_ok=True)
        return _library(compiler, source, folder)
    except subprocess.TimeoutExpired:
        return f"{shlex.join(compiler)} took over {_TIMEOUT_S} s for {source.name}"
    except OSError as error:
        return f"{shlex.join(compiler)} made no library of {source.name}: {str(error)[:200]}"


def _found(compiler: str) -> list[str]:
    """A compiler with its arguments, such as "ccache gcc -m64"; [] if the program is not there."""
    try:
        words = [compiler] if shutil.which(compiler) else shlex.split(compiler)
    except ValueError:  # a quotation without end
        return []
    program = shutil.which(words[0])
    return [program, *words[1:]] if program else []


def _library(compiler: list[str], source: Path, folder: Path) -> ctypes.CDLL:
    """The library in a folder, made if it is not there. Raises OSError, TimeoutExpired."""
    programs = [os.path.realpath(found) for word in compiler if (found := shutil.which(word))]
    depends_on = [source.read_text(), *programs, *compiler[1:], _cpu(), *_FLAGS]
    keys = {options: _digest("\0".join([*depends_on, *options]).encode()) for options in _wishes()}
    for key in keys.values():
        for kept in folder.glob(f"{source.stem}-{key}-*.so"):
            try:
                return _loaded(kept)
            except OSError:  # damaged, or what it needs is gone
                with suppress(OSError):
                    kept.unlink()
    # Whole before it is at its place. What was loaded can lie in the way of cleaning up, on NFS.
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as passing:
        made, command = Path(passing, "made.so"), [*compiler, *_FLAGS]
        options = _taken(command, Path(passing))
        failure = _failure([*command, *options, str(source), "-o", str(made), "-lm"])
        if failure:
            raise OSError(failure)
        sync(made)
        name = f"{source.stem}-{keys[options]}-{_digest(made.read_bytes())}.so"
        kept = made.replace(folder / name)
    sync(folder)
    return _loaded(kept)


def _loaded(kept: Path) -> ctypes.CDLL:
    """A kept library. OSError for a damaged one, which could end the process where it is loaded."""
    if _digest(read_plain(kept, _MOST_BYTES)) != kept.stem.rpartition("-")[2]:
        raise OSError("damaged")
    return ctypes.CDLL(str(kept))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _wishes() -> tuple[tuple[str, ...], ...]:
    """Options, best first: code for the very CPU that it runs on, on all cores or on one.

    On x86 GCC takes -mcpu too, and makes code for any CPU of the last twenty years.
    """
    native = "-march=native" if platform.machine().lower() in _X86 else "-mcpu=native"
    return (native, "-fopenmp"), (native,)


def _taken(command: list[str], folder: Path) -> tuple[str, ...]:
    """The first wish with which a few lines compile and load; they fail for no other reason."""
    trial, failure = folder / "trial.c", ""
    trial.write_text(_TRIAL)
    for number, options in enumerate(_wishes()):
        made = folder / f"trial-{number}.so"
        failure = _failure([*command, *options, str(trial), "-o", str(made)])
        if not failure:
            try:
                ctypes.CDLL(str(made))
            except OSError as error:
                failure = str(error)
            else:
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
