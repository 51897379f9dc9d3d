"""C files of the package: compiled once, kept in the user's own folder, and why not where not."""

import ctypes
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt import clibrary
from gpt.clibrary import c_library
from tests.test_generate import build
from tests.test_onerow import steps

SIX_TIMES = "int six_times(int number) { return 6 * number; }\n"


@pytest.fixture(autouse=True)
def loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other tests loaded stays theirs."""
    monkeypatch.delenv("CC", raising=False)
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    c_library.cache_clear()
    yield
    c_library.cache_clear()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for compiled code of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpt-train" / "compiled"


@pytest.fixture
def line(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`line.c` in place of the package's files, compiled in a moment."""
    source = tmp_path / "line.c"
    source.write_text(SIX_TIMES)
    monkeypatch.setattr(clibrary, "__file__", str(tmp_path / "clibrary.py"))
    return source


def check_line() -> None:
    """The library of `line.c` is there, as in a process that begins."""
    c_library.cache_clear()
    library = c_library("line")
    assert isinstance(library, ctypes.CDLL), library
    assert library.six_times(7) == 42


class Compiler:
    """A compiler that first does what some lines of shell say, then is `cc`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str = "") -> None:
        self.path, self._log = folder / "compiler", folder / "log"
        self.path.write_text(f'#!/bin/sh\necho "$*" >> "{self._log}"\n{lines}\nexec cc "$@"\n')
        self.path.chmod(0o755)
        monkeypatch.setenv("CC", str(self.path))

    def calls(self) -> list[str]:
        """The arguments of each time that it ran."""
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.mark.usefixtures("line")
def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, monkeypatch)
    check_line()
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    assert not kept.stat().st_mode & 0o022, "nobody else may write it"
    ran = len(compiler.calls())
    assert ran > 0
    check_line()
    assert len(compiler.calls()) == ran


def test_another_cpu_or_source_or_compiler_has_code_of_its_own(
    cache: Path, line: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_line()
    monkeypatch.setattr(clibrary, "_cpu", lambda: "another one")
    check_line()
    assert len(list(cache.iterdir())) == 2
    line.write_text(f"/* Another. */ {SIX_TIMES}")
    check_line()
    assert len(list(cache.iterdir())) == 3
    Compiler(tmp_path, monkeypatch)
    check_line()
    assert len(list(cache.iterdir())) == 4


@pytest.mark.usefixtures("line")
def test_without_a_folder_of_ones_own_it_is_made_in_passing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clibrary, "compiled_folder", lambda: None)
    check_line()


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C compiler: CC='no-such-compiler' is not found"),
        ("no-such-wrapper cc", "no C compiler: CC='no-such-wrapper cc' is not found"),
        ("'cc", "no C compiler"),
        ("''", "no C compiler"),
        ("false", "exit code 1"),
        ("false -m64", "/false -m64 made no library of line.c"),
    ],
)
def test_without_code_there_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert reason in str(c_library("line"))
    assert not cache.is_dir() or not list(cache.iterdir()), "nothing is left behind"


@pytest.mark.usefixtures("line")
def test_a_compiler_may_come_with_arguments(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(tmp_path, monkeypatch)
    for arguments in ("-DSOME='a b'", "-DANOTHER"):
        monkeypatch.setenv("CC", f"{compiler.path} {arguments}")
        check_line()
        assert compiler.calls()[-1].startswith(arguments.replace("'", ""))
    assert len(list(cache.iterdir())) == 2, "other arguments, other code"
    monkeypatch.setenv("CC", f"env {compiler.path}")
    check_line()
    compiler.path.rename(tmp_path / "another")
    monkeypatch.setenv("CC", f"env {tmp_path}/another")
    check_line()
    assert len(list(cache.iterdir())) == 4, "another compiler behind the same first word"
    monkeypatch.setenv("CC", " ")
    check_line()


@pytest.mark.usefixtures("line")
def test_a_compilers_path_may_have_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my tools").mkdir()
    compiler = Compiler(tmp_path / "my tools", monkeypatch)
    check_line()
    assert compiler.calls()


def first_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "no library"])
def test_a_kept_library_that_is_damaged_is_made_anew(
    cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(tmp_path, monkeypatch)
    check_line()
    (kept,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "damaged"))  # a path not loaded before
    damaged = tmp_path / "damaged" / kept.relative_to(tmp_path / "cache")
    damaged.parent.mkdir(parents=True, mode=0o700)
    sound = kept.read_bytes()
    if damage == "no library":
        key = kept.stem.rpartition("-")[0]
        damaged.with_name(f"{key}-{first_of(b'none')}.so").write_bytes(b"none")
    else:
        flipped = sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:]
        damaged.write_bytes({"empty": b"", "cut": sound[:5000], "a bit": flipped}[damage])
    check_line()
    (made,) = damaged.parent.iterdir()
    assert made.stem.endswith(first_of(made.read_bytes()))
    ran = len(compiler.calls())
    assert ran == 4, "a trial and the source, twice"
    check_line()
    assert len(compiler.calls()) == ran


@pytest.mark.usefixtures("line")
def test_what_is_kept_is_durable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, int]] = []

    def sync(path: Path) -> None:
        synced.append((path == cache, len(list(cache.glob("line-*.so")))))

    monkeypatch.setattr(clibrary, "sync", sync)
    check_line()
    assert synced == [(False, 0), (True, 1)], "the file before it has its name, then the name"


@pytest.mark.usefixtures("line")
def test_what_cannot_be_loaded_is_not_compiled_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = 'while [ "$1" != -o ]; do shift; done; echo none > "$2"; exit 0'
    compiler = Compiler(tmp_path, monkeypatch, lines)
    assert "trial" in str(c_library("line"))
    assert all("line.c" not in call for call in compiler.calls())
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("line")
def test_without_a_compiler_nothing_that_is_kept_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    check_line()
    monkeypatch.setenv("CC", "none")
    c_library.cache_clear()
    assert c_library("line") == "there is no C compiler: CC='none' is not found"


def test_a_mistake_in_the_source_is_told(line: Path) -> None:
    line.write_text("int f(void) { return }")
    assert "error: expected expression" in str(c_library("line"))


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize(
    ("machine", "native"), [("x86_64", "march"), ("AMD64", "march"), ("aarch64", "mcpu")]
)
def test_code_is_for_this_very_cpu_or_there_is_none(
    machine: str, native: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    compiler = Compiler(tmp_path, monkeypatch, "echo 'error: unrecognized option' >&2; exit 1")
    assert "unrecognized option" in str(c_library("line"))
    assert ["-fopenmp" in call for call in compiler.calls()] == [True, False]
    assert all(f"-{native}=native" in call for call in compiler.calls())


@pytest.mark.usefixtures("line")
def test_a_compiler_without_openmp_makes_code_for_one_thread(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(tmp_path, monkeypatch, 'case "$*" in *-fopenmp*) exit 1;; esac')
    check_line()
    ran = len(compiler.calls())
    check_line()
    assert len(compiler.calls()) == ran, "what is kept is used"
    assert len(list(cache.iterdir())) == 1


KILLED = "gcc: fatal error: Killed signal terminated program cc1"


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize(
    ("at", "lines", "reason"),
    [
        ("trial", "kill -9 $$", "killed by signal 9"),
        ("trial", f"echo '{KILLED}' >&2; exit 1", KILLED),
        ("line", "kill -9 $$", "killed by signal 9"),
        ("line", f"echo '{KILLED}' >&2; exit 1", KILLED),
        ("line", "echo 'error: No space left on device' >&2; exit 1", "No space left"),
    ],
    ids=["killed for the trial", "its part, too", "killed", "its part", "a full disk"],
)
def test_what_fails_in_passing_is_no_refusal_of_options(
    cache: Path, at: str, lines: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    once = f"mkdir {tmp_path}/failed 2>&- && {{ {lines}; }}"
    compiler = Compiler(tmp_path, monkeypatch, f'case "$*" in */{at}.c*) {once};; esac')
    assert reason in str(c_library("line"))
    assert list(cache.iterdir()) == []
    check_line()
    assert all("-fopenmp" in call for call in compiler.calls())


@pytest.mark.usefixtures("line")
def test_a_compiler_hears_no_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = f"{sys.executable} -SEc 'import os; print(os.getsid(0))' >> {tmp_path}/sessions"
    Compiler(tmp_path, monkeypatch, session)
    check_line()
    sessions = (tmp_path / "sessions").read_text().split()
    assert sessions
    assert str(os.getsid(0)) not in sessions


@pytest.mark.usefixtures("line")
def test_a_compiler_without_end_is_ended_with_what_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clibrary, "_TIMEOUT_S", 0.3)
    Compiler(tmp_path, monkeypatch, f"(while echo >> {tmp_path}/alive; do sleep 0.01; done)")
    assert "took over 0.3 s for line.c" in str(c_library("line"))
    size = (tmp_path / "alive").stat().st_size
    time.sleep(0.1)
    assert (tmp_path / "alive").stat().st_size == size


def test_without_openmp_one_thread_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model, ids, alone = build(), list(range(40, 50)), clibrary._wishes()[1:]
    together = steps(model, ids, 2)
    request.getfixturevalue("cache")
    c_library.cache_clear()
    monkeypatch.setattr(clibrary, "_wishes", lambda: alone)
    assert torch.equal(steps(model, ids, 2), together)
