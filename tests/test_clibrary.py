"""C files of the package: compiled once, kept in the user's own folder, and why not where not."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt import clibrary
from gpt.clibrary import c_library
from tests.test_generate import build
from tests.test_onerow import steps


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for compiled code of the test's own; what was loaded is loaded anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if isinstance(c_library("decode"), str):
        pytest.skip("no C compiler")
    c_library.cache_clear()
    for kept in (tmp_path / "cache").rglob("*.so"):
        kept.unlink()
    yield tmp_path / "cache" / "gpt-train" / "compiled"
    c_library.cache_clear()


def no_compiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a compiler ran")

    monkeypatch.setattr("gpt.clibrary.subprocess.run", run)


def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(c_library("decode"), ctypes.CDLL)
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    assert not kept.stat().st_mode & 0o022, "nobody else may write it"
    c_library.cache_clear()
    no_compiler_runs(monkeypatch)
    assert isinstance(c_library("decode"), ctypes.CDLL)


def test_another_cpu_or_source_or_compiler_has_code_of_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    c_library("decode")
    monkeypatch.setattr(clibrary, "_cpu", lambda: "another one")
    c_library.cache_clear()
    assert isinstance(c_library("decode"), ctypes.CDLL)
    assert len(list(cache.iterdir())) == 2


def test_without_a_folder_of_ones_own_it_is_made_in_passing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clibrary, "compiled_folder", lambda: None)
    assert isinstance(c_library("decode"), ctypes.CDLL)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C compiler"), ("false", "exit code 1")],
)
def test_without_code_there_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert reason in str(c_library("decode"))
    assert not cache.is_dir() or not list(cache.iterdir()), "nothing is left behind"


def test_a_mistake_in_the_source_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.c").write_text("int f(void) { return }")
    monkeypatch.setattr(clibrary, "__file__", str(tmp_path / "clibrary.py"))
    assert "error" in str(c_library("broken"))


def test_without_openmp_one_thread_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), list(range(40, 50))
    together = steps(model, ids, 2)
    c_library.cache_clear()
    monkeypatch.setattr(clibrary, "_WISHES", (("-march=native",),))
    assert torch.equal(steps(model, ids, 2), together)
