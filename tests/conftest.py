"""What many tests need: a text, and a config of a model that trains in a second."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models only wait for a second thread

import pytest
from hypothesis import settings

from gpt.config import Config
from gpt.configfile import load_config

ConfigMaker = Callable[..., Config]

# Started in the background of a script, this process ignores Ctrl-C, and its children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, and no limit in time for one of them on a busy machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def write_text(folder: Path) -> Path:
    """Four thousand words with some structure to learn, the same each time."""
    rng = random.Random(7)
    words = ["the", "cat", "sat", "on", "a", "mat", "学习", "率", "and", "ran", "🙂"]
    path = folder / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(4000)), encoding="utf-8")
    return path


def tiny_config(folder: Path, **changes: str) -> Config:
    """A run in `folder` that takes a second; `section__key="value"` changes one of its values."""
    text = folder / "words.txt"
    values = {
        "run.name": "tiny",
        "run.dir": str(folder / "runs"),
        "data.source": str(text if text.exists() else write_text(folder)),
        "data.dir": str(folder / "data"),
        "tokenizer.kind": "bytes",
        "model.n_layer": "2",
        "model.n_head": "2",
        "model.n_embd": "16",
        "model.context_len": "16",
        "optimizer.lr": "1e-2",
        "train.max_steps": "12",
        "train.batch_size": "6",
        "eval.every_steps": "4",
        "eval.max_tokens": "200",
        "eval.sample_tokens": "5",
        "checkpoint.every_steps": "4",
        "log.every_steps": "1",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, list(values.items()))


def _picture_of_nothing(run: Path, png: Path) -> None:
    assert run.is_dir()
    png.write_bytes(b"see test_plot.py")


@pytest.fixture(scope="session", autouse=True)
def runs_end_without_a_picture() -> Iterator[None]:
    """Drawing takes as long as a tiny run: where it is not looked at, a file stands for it."""
    ending = sys.modules.get("gpt.ending")
    with pytest.MonkeyPatch.context() as patch:
        if ending is not None:  # else nothing here trains in this process
            patch.setattr(ending, "plot_run", _picture_of_nothing)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose runs end as a user's do."""
    import gpt.ending
    import gpt.plot

    monkeypatch.setattr(gpt.ending, "plot_run", gpt.plot.plot_run)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that was stopped hears no more signals: its process would be ending."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture
def make_config(tmp_path: Path, text_file: Path) -> ConfigMaker:
    """`tiny_config` in this test's folder; further arguments change its values."""
    assert text_file.exists()
    return lambda **changes: tiny_config(tmp_path, **changes)
