"""Slow steps are told when they are over, and hanging ones while they hang."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import gpt.pace
import gpt.train
from gpt.metrics import read_metrics
from gpt.pace import SLOW_WINDOW, HangWatch, SlowSteps
from gpt.train import train
from tests.conftest import ConfigMaker


def known(seconds: float) -> SlowSteps:
    slow = SlowSteps()
    for step in range(SLOW_WINDOW):
        assert slow.usual_s is None
        assert slow.add(seconds, step) == ""
    return slow


def test_ten_times_the_median_is_slow_and_told_once() -> None:
    slow = known(0.2)
    assert slow.usual_s == 0.2
    assert slow.add(1.99, 50) == ""
    assert slow.add(2.01, 51) == "step 51 took 2.0 s, 10 times the median"
    assert slow.add(30.0, 52) == "", "told lately"
    assert slow.add(30.0, 51 + SLOW_WINDOW) != ""
    assert known(0.01).add(0.9, 50) == "", "less than a second harms nobody"


def test_a_hang_is_told_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.pace, "LEAST_HANG_S", 0.05)
    said: list[str] = []
    watch = HangWatch(said.append, every_s=0.01)
    watch.begin(1, None)
    time.sleep(0.1)
    assert not said
    assert watch._thread is None, "nobody knows yet how long a step takes"
    watch.begin(2, 1.0)
    time.sleep(0.1)
    assert not said, "not ten times the median yet"
    watch.begin(1234, 0.001)
    end = time.monotonic() + 20
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    assert said[0].startswith("warning: step 1,234 has been going on for 0 s, ")
    assert "times the median; look with: py-spy dump --pid " in said[0]
    watch.end()
    time.sleep(0.05)
    count = len(said)
    time.sleep(0.2)
    assert len(said) == count, "over"
    watch.close()
    assert "hang-watch" not in {thread.name for thread in threading.enumerate()}


def test_a_run_tells_of_a_step_that_hangs_and_ends_as_without(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpt.pace, "LEAST_HANG_S", 0.2)
    step = gpt.train.train_step

    def train_step(training: Any, *batch: Any, **more: Any) -> Any:
        if training.progress.step == 25:
            time.sleep(2.5)
        return step(training, *batch, **more)

    changes = {"train__max_steps": "30", "eval__every_steps": "30", "checkpoint__every_steps": "30"}
    plain, hung = make_config(run__name="plain", **changes), make_config(**changes)
    train(plain)
    assert "has been going on" not in capsys.readouterr().err
    monkeypatch.setattr(gpt.train, "train_step", train_step)
    train(hung)
    said = capsys.readouterr().err
    assert "warning: step 26 has been going on for " in said
    assert "in step_once (gpt/train.py:" in said
    assert "warning: step 26 took 2.5 s" in said
    assert said.index("has been going on") < said.index("step 26 took") < said.index("step 27/30")
    losses = [
        [r["loss"] for r in read_metrics(Path(config.run.dir) / config.run.name) if "loss" in r]
        for config in (plain, hung)
    ]
    assert losses[0] == losses[1]
    assert "hang-watch" not in {thread.name for thread in threading.enumerate()}


def test_a_hang_is_told_at_ten_times_the_median_and_then_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 1.5, 9.0, 10.0, 20.0, 39.0, 40.0, 100.0, 160.0])
    monkeypatch.setattr("gpt.pace.time.monotonic", lambda: next(clock))
    said: list[str] = []
    watch, looks = HangWatch(said.append), iter([False] * 8 + [True])
    monkeypatch.setattr(watch._over, "wait", lambda _: next(looks))
    watch._now = (7, gpt.pace.time.monotonic(), 1.0)
    watch._watch()
    assert [re.findall(r"for (\d+) s", line) for line in said] == [["10"], ["40"], ["160"]]
