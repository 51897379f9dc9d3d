"""Whatever ends a run, it says where it stands and what to type; and what it says works."""

import re
import shlex
import signal
from pathlib import Path

import pytest

import gpt.train
from gpt.config import Config
from gpt.configfile import dump_config
from gpt.ending import STEPS, TIME, reached_limit
from gpt.errors import Stopped
from gpt.history import read_run
from gpt.plan import Plan
from gpt.report.standing import standing
from gpt.rundir import checkpoint_folders, run_path, step_of
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_contract import Ended, command


def start(config: Config, folder: Path) -> Ended:
    path = folder / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return command("gpt-train", "--config", str(path))


def follow(ended: Ended) -> Ended:
    """Types what the command said to type."""
    (words,) = re.findall(r"^(?:go on|stands) .*?(gpt-train .*)$", ended.stderr, re.MULTILINE)
    name, *arguments = shlex.split(words)
    return command(name, *arguments)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 24),
        ({"train__max_steps": "null", "train__max_tokens": str(12 * 96)}, 24),
        ({"train__max_steps": "null", "train__max_epochs": "0.05"}, 16),
        ({"eval__patience": "1", "eval__every_steps": "1", "optimizer__lr": "1e-12"}, 12),
    ],
)
def test_a_run_that_ended_by_a_limit_goes_on_beyond_it(
    changes: dict[str, str], steps: int, make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(**changes)
    ended = start(config, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert step_of(checkpoint_folders(run_path(config))[-1]) < steps
    further = follow(ended)
    assert further.returncode == 0, further.stderr
    assert step_of(checkpoint_folders(run_path(config))[-1]) == steps


def test_a_run_that_ended_by_time_goes_on_beyond_it(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(train__max_time_s="0.2", train__max_steps="100000")
    ended = start(config, tmp_path)
    assert ended.returncode == 0, ended.stderr
    stood = step_of(checkpoint_folders(run_path(config))[-1])
    ended = follow(ended)
    assert ended.returncode == 0, ended.stderr
    before, stood = stood, step_of(checkpoint_folders(run_path(config))[-1])
    assert stood > before
    name, *arguments = shlex.split(standing(read_run(run_path(config))).go_on)
    assert command(name, *arguments).returncode == 0
    assert step_of(checkpoint_folders(run_path(config))[-1]) > stood


@pytest.mark.parametrize(("broken_at", "stands"), [(6, "at step 4, saved"), (2, "no checkpoint")])
def test_a_bug_of_ours_too_says_where_the_run_stands(
    broken_at: int,
    stands: str,
    make_config: ConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    step_once = gpt.train.step_once

    def break_down(run, training, *rest):  # type: ignore[no-untyped-def]
        if training.progress.step == broken_at:
            raise ZeroDivisionError
        step_once(run, training, *rest)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gpt.train, "step_once", break_down)
        train(config)
    said = capsys.readouterr().err
    assert stands in said
    ended = follow(Ended(1, "", said))
    assert ended.returncode == 0, ended.stderr
    assert step_of(checkpoint_folders(run_path(config))[-1]) == 12


def test_a_run_that_was_moved_goes_on_where_it_lies(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    assert start(config, tmp_path).returncode == 0
    moved = tmp_path / "else where" / "moved"
    moved.parent.mkdir()
    run_path(config).rename(moved)
    monkeypatch.chdir(moved)
    for run in (moved, Path()):
        go_on = standing(read_run(run)).go_on
        assert f"--run.dir {shlex.quote(str(moved.parent))} --run.name moved" in go_on
    name, *arguments = shlex.split(go_on)
    further = command(name, *arguments, cwd=moved)
    assert further.returncode == 0, further.stderr
    assert step_of(checkpoint_folders(moved)[-1]) == 24
    assert not run_path(config).exists()


def test_a_stopped_run_says_it_once(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = gpt.train.evaluate

    def stop(*given):  # type: ignore[no-untyped-def]
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*given)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(gpt.train, "evaluate", stop)
        train(make_config())
    said = capsys.readouterr().err
    assert len(re.findall(r"gpt-train --config", said)) == 1
    assert follow(Ended(143, "", said)).returncode == 0


def test_a_log_that_cannot_be_read_is_no_error_of_the_training(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.metrics.MOST_BYTES", 100)
    ended = start(make_config(), tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = ended.stderr.splitlines()
    assert sum(line.startswith("warning: no picture or report (") for line in told) == 1
    assert sum(line.startswith("warning: no verdict (") for line in told) == 1
    assert told[-1].startswith("go on")


def test_a_limit_in_seconds_is_that_number_of_seconds(make_config: ConfigMaker) -> None:
    config = make_config(train__max_time_s="10")
    plan = Plan("constant", 12, 0, 0.1, 0.0)
    reached = [reached_limit(config, plan, 3, seconds) for seconds in (0.0, 9.99, 10.0, 99.0)]
    assert reached == ["", "", TIME, TIME]
    assert [reached_limit(config, plan, step, 0.0) for step in (11, 12)] == ["", STEPS]
