"""Interrupted and continued is the same run as uninterrupted, to the last bit."""

import json
import signal
import time
from pathlib import Path

import pytest

import gpt.train
from gpt.config import Config
from gpt.configfile import dump_config
from gpt.errors import Stopped, UserError
from gpt.metrics import read_metrics
from gpt.schedule import Plan
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.torture.runs import Command, logged, until


def final_state(config: Config, step: int) -> tuple[dict[str, bytes], dict[str, object]]:
    folder = Path(config.run.dir) / config.run.name / "checkpoints" / f"step-{step:08d}"
    tensors = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    state = json.loads((folder / "state.json").read_text())
    state["progress"].pop("seconds")
    return tensors, state


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Sends SIGTERM while the given steps are in the making."""
    step_once = gpt.train.step_once

    def step_and_signal(run, training, *rest):  # type: ignore[no-untyped-def]
        if training.progress.step in steps:
            steps.remove(training.progress.step)
            signal.raise_signal(signal.SIGTERM)
        step_once(run, training, *rest)

    monkeypatch.setattr(gpt.train, "step_once", step_and_signal)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adafactor", "muon"])
def test_interrupted_equals_uninterrupted(
    optimizer: str, text_file: Path, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, accumulation of 3, more than one epoch; stopped off and on the checkpoint grid."""
    changes = {
        "optimizer__name": optimizer,
        "model__dropout": "0.2",
        "train__micro_batch_size": "2",
        "train__max_steps": "80" if optimizer == "adamw" else "12",
        "eval__every_steps": "4" if optimizer != "adamw" else "16",
        "checkpoint__every_steps": "4" if optimizer != "adamw" else "16",
    }
    if optimizer == "adamw":  # a text that 80 steps read more than once
        text_file.write_text(text_file.read_text()[:6000])
    whole, parts = (
        make_config(run__name="whole", **changes),
        make_config(run__name="parts", **changes),
    )
    train(whole)
    stops = [0, 3, 6, 7] if optimizer != "adamw" else [0, 25, 67]
    stop_at(monkeypatch, stops)
    for _ in range(len(stops)):
        with pytest.raises(Stopped) as stopped:
            train(parts)
        assert stopped.value.exit_code == 143
    train(parts)
    last = whole.train.max_steps or 0
    assert final_state(whole, last) == final_state(parts, last)
    assert logged(whole) == logged(parts)
    if optimizer == "adamw":
        epochs = [line["epoch"] for line in logged(whole) if line["kind"] == "train"]
        assert float(str(epochs[-1])) > 1, "the test must cross an epoch"


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("warmup_cosine", {}),
        ("wsd", {"decay_fraction": "0.6"}),
        ("wsd", {"decay_shape": "linear", "decay_steps": "8"}),
        ("linear", {}),
        ("constant", {}),
        ("inverse_sqrt", {}),
        ("polynomial", {"power": "2"}),
        ("cosine_restarts", {"cycles": "3"}),
        ("hf_cosine", {}),
        ("chapter", {"cosine_steps": "4", "min_lr": "1e-3"}),
    ],
)
def test_interrupted_in_every_phase_of_a_schedule(
    schedule: str,
    changes: dict[str, str],
    make_config: ConfigMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Muon has two peaks, and so more than one group's rate to bring back."""
    values = {f"schedule__{key}": value for key, value in changes.items()}
    values |= {
        "schedule__name": schedule,
        "schedule__warmup_steps": "2",
        "optimizer__name": "muon",
        "optimizer__adamw_lr": "3e-3",
        "model__n_layer": "1",
        "eval__every_steps": "12",
        "checkpoint__every_steps": "12",
    }
    whole, parts = (
        make_config(run__name="whole", **values),
        make_config(run__name="parts", **values),
    )
    train(whole)
    stop_at(monkeypatch, [1, 4, 8])
    for _ in range(3):
        with pytest.raises(Stopped):
            train(parts)
    train(parts)
    assert final_state(whole, 12) == final_state(parts, 12)
    assert logged(whole) == logged(parts)
    plan = Plan.from_config(whole, 12)
    used = [record["lr"] for record in logged(whole) if record["kind"] == "train"]
    assert used == pytest.approx([plan.rate(step, 1e-2) for step in range(12)], rel=1e-9)
    assert len(set(used)) > 2


def test_fp16_with_its_scaler_resumes_exactly(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config(run__name="whole", train__dtype="fp16")
    parts = make_config(run__name="parts", train__dtype="fp16")
    train(whole)
    stop_at(monkeypatch, [5])
    with pytest.raises(Stopped):
        train(parts)
    train(parts)
    assert final_state(whole, 12) == final_state(parts, 12)
    assert logged(whole) == logged(parts)


def test_stop_during_evaluation_repeats_that_evaluation(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = make_config(run__name="whole"), make_config(run__name="parts")
    train(whole)
    evaluate, calls = gpt.train.evaluate, []

    def evaluate_and_signal(training, split, device, should_stop):  # type: ignore[no-untyped-def]
        calls.append(training.progress.step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return evaluate(training, split, device, should_stop)

    monkeypatch.setattr(gpt.train, "evaluate", evaluate_and_signal)
    with pytest.raises(Stopped) as stopped:
        train(parts)
    assert stopped.value.exit_code == 130
    train(parts)
    assert calls == [4, 8, 8, 12]
    assert logged(whole) == logged(parts)
    assert final_state(whole, 12) == final_state(parts, 12)


def test_stop_while_a_sample_is_drawn_repeats_that_evaluation(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long sample takes longer than a process is given to end."""
    changes = {"eval__sample_tokens": "30"}
    whole = make_config(run__name="whole", **changes)
    parts = make_config(run__name="parts", **changes)
    train(whole)
    generate, drawn = gpt.train.generate, []

    def generate_and_signal(*arguments):  # type: ignore[no-untyped-def]
        for piece in generate(*arguments):
            drawn.append(piece)
            if len(drawn) == 5:
                signal.raise_signal(signal.SIGTERM)
            yield piece

    monkeypatch.setattr(gpt.train, "generate", generate_and_signal)
    with pytest.raises(Stopped):
        train(parts)
    assert len(drawn) == 5
    train(parts)
    assert logged(whole) == logged(parts)
    assert final_state(whole, 12) == final_state(parts, 12)


def test_stop_during_the_last_evaluation_is_made_up_for_once(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = make_config(run__name="whole"), make_config(run__name="parts")
    train(whole)
    evaluate = gpt.train.evaluate

    def evaluate_and_signal(training, split, device, should_stop):  # type: ignore[no-untyped-def]
        if training.progress.step == 12:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(training, split, device, should_stop)

    monkeypatch.setattr(gpt.train, "evaluate", evaluate_and_signal)
    with pytest.raises(Stopped):
        train(parts)
    monkeypatch.setattr(gpt.train, "evaluate", evaluate)
    for _ in range(2):
        train(parts)
        assert logged(whole) == logged(parts)
        assert final_state(whole, 12) == final_state(parts, 12)


def test_kill_minus_nine_loses_nothing(make_config: ConfigMaker, tmp_path: Path) -> None:
    """Killed at random instants, started again each time; seeds are the kill's delays."""
    changes = {"train__max_steps": "100", "checkpoint__every_steps": "5", "eval__every_steps": "25"}
    whole, killed = (
        make_config(run__name="whole", **changes),
        make_config(run__name="killed", **changes),
    )
    train(whole)
    config = tmp_path / "killed.yaml"
    config.write_text(dump_config(killed), encoding="utf-8")
    run = Path(killed.run.dir) / "killed"
    kills = 0
    for delay in (0.03, 0.15, 0.0):
        command = Command(["gpt-train", "--config", str(config)], tmp_path)
        before = len(read_metrics(run))
        assert until(lambda: len(read_metrics(run)) > before, command), command.said  # noqa: B023
        if delay:
            time.sleep(delay)
            command.process.kill()
            kills += command.wait() == -signal.SIGKILL
        else:
            assert command.wait() == 0
    assert kills >= 1, "the run was over before it was killed"
    assert final_state(whole, 100) == final_state(killed, 100)
    assert logged(whole) == logged(killed)
    assert not list(run.rglob(".tmp*"))


def test_damaged_newest_checkpoint_falls_back(
    make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    train(config)
    before = final_state(config, 12), logged(config)
    folder = Path(config.run.dir) / "tiny" / "checkpoints" / "step-00000012"
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().err
    assert "model.safetensors" in said
    assert "damaged" in said
    assert "going on after step 8" in said
    assert (final_state(config, 12), logged(config)) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer__lr": "2e-2"}, "optimizer.lr: 0.01 there, 0.02 now"),
        ({"model__n_layer": "3"}, "model.n_layer: 2 there, 3 now"),
        ({"run__seed": "1"}, "run.seed: 1337 there, 1 now"),
        ({"train__max_steps": "13"}, "train.max_steps: 12 there, 13 now"),
    ],
)
def test_another_config_is_refused_and_nothing_written(
    changes: dict[str, str], named: str, make_config: ConfigMaker
) -> None:
    config = make_config()
    train(config)
    run = Path(config.run.dir) / "tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        train(make_config(**changes))
    assert named in str(error.value)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_changed_text_is_refused(make_config: ConfigMaker, text_file: Path) -> None:
    train(make_config())
    text_file.write_text(text_file.read_text(encoding="utf-8")[5:], encoding="utf-8")
    with pytest.raises(UserError, match="trained on other data"):
        train(make_config())


def test_moved_text_and_run_go_on(
    make_config: ConfigMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config(run__name="whole")
    train(whole)
    stop_at(monkeypatch, [5])
    with pytest.raises(Stopped):
        train(make_config(run__name="moved"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "moved").rename(tmp_path / "elsewhere" / "moved")
    text_file.rename(tmp_path / "elsewhere" / "words.txt")
    moved = make_config(
        run__name="moved",
        run__dir=str(tmp_path / "elsewhere"),
        data__source=str(tmp_path / "elsewhere" / "words.txt"),
        data__dir=str(tmp_path / "elsewhere" / "data"),
    )
    train(moved)
    assert final_state(whole, 12) == final_state(moved, 12)


def test_resume_never_and_must(make_config: ConfigMaker) -> None:
    config = make_config()
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config, resume="must")
    train(config)
    with pytest.raises(UserError, match="already holds"):
        train(config, resume="never")
    train(config, resume="must")


def test_another_number_format_is_refused(make_config: ConfigMaker) -> None:
    train(make_config(train__dtype="fp32"))
    with pytest.raises(UserError, match=r"trained with float32.*say --train\.dtype fp32"):
        train(make_config(train__max_steps="16", train__dtype="bf16"), rate="extend")
