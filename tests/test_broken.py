"""What becomes of a run whose numbers break: what it keeps, what it says, what its log tells."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt.step
import gpt.train
from gpt.checkpoint import Training
from gpt.config import Config
from gpt.errors import UserError
from gpt.guard import SpikeGuard
from gpt.health.diagnose import diagnose
from gpt.history import read_run
from gpt.metrics import Record, read_metrics
from gpt.rundir import checkpoint_folders
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_resume import final_state, logged


def run_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def events(config: Config, name: str) -> list[Record]:
    return [r for r in read_metrics(run_of(config)) if r.get("event") == name]


@pytest.mark.parametrize("saved", [True, False])
def test_broken_weights_are_never_saved(
    saved: bool, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They break in the update right before a save; the checkpoint before stays the newest."""
    config = make_config(train__max_steps="12", eval__every_steps="12")
    step, at = gpt.train.train_step, 8 if saved else 4

    def breaks(training: Training, *batch: Tensor, **more: Any) -> Any:
        result = step(training, *batch, **more)
        if training.progress.step == at - 1:
            with torch.no_grad():
                training.model.get_parameter("tok_emb.weight")[0, 0] = math.inf
        return result

    monkeypatch.setattr(gpt.train, "train_step", breaks)
    with pytest.raises(
        UserError, match=rf"tok_emb.weight is not finite \(or above 1e\+18\) after step {at},"
    ) as stopped:
        train(config)
    run = run_of(config)
    assert [f.name for f in checkpoint_folders(run)] == (["step-00000004"] if saved else [])
    way = "--optimizer.lr 3.3e-03 " + ("--rate override" if saved else "--run.name tiny-lower-lr")
    assert str(stopped.value).endswith(way)
    diverged = events(config, "diverged")
    assert [(r["step"], r["where"]) for r in diverged] == [(at, "tok_emb.weight")]
    (found,) = [f for f in diagnose(read_run(run)) if f.id == "nonfinite"]
    assert found.evidence.startswith("weights not finite at step")


def break_losses(monkeypatch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """The loss of these batches is no number."""
    backward, step = gpt.step._backward, gpt.train.train_step
    current = [0]

    def train_step(training: Training, *batch: Tensor, **more: Any) -> Any:
        current[0] = training.progress.next_batch
        return step(training, *batch, **more)

    def broken(*arguments: Any) -> float:
        loss = backward(*arguments)
        return math.nan if current[0] in batches else loss

    monkeypatch.setattr(gpt.train, "train_step", train_step)
    monkeypatch.setattr(gpt.step, "_backward", broken)


def test_a_batch_stands_in_the_log_once_though_it_came_twice(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right behind it, before the next save: the resumed run meets it again."""
    break_losses(monkeypatch, {2, 4, 5})
    whole, parts = make_config(run__name="whole"), make_config(run__name="parts")
    train(whole)
    step_once, stopped = gpt.train.step_once, []

    def die(run: Path, training: Training, *rest: Any) -> None:
        if training.progress.next_batch == 6 and not stopped:
            stopped.append(training.progress.step)
            raise KeyboardInterrupt
        step_once(run, training, *rest)

    monkeypatch.setattr(gpt.train, "step_once", die)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    train(parts)
    assert final_state(whole, 12) == final_state(parts, 12)
    assert logged(whole) == logged(parts)
    for config in (whole, parts):
        assert [(r["batch"], r["step"]) for r in events(config, "nonfinite")] == [
            (2, 2),
            (4, 3),
            (5, 3),
        ]


def test_the_advice_for_broken_batches_is_taken(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, set(range(5, 8)))
    config = make_config(train__skip_limit="2")
    with pytest.raises(UserError, match=r"--train.skip_limit 5$"):
        train(config)
    train(make_config(train__skip_limit="5"))
    assert checkpoint_folders(run_of(config))[-1].name == "step-00000012"
    assert [r["batch"] for r in events(config, "nonfinite")] == [5, 6, 7]


def test_a_step_skipped_for_a_spike_is_not_said_to_have_been_broken(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts among those in a row all the same."""
    at = (4, 0)  # the step that stands out, with no skip before it

    def outlier(guard: SpikeGuard, *_: float) -> str:
        progress = guard._progress
        return "far above" if (progress.step, progress.skips_in_row) == at else ""

    monkeypatch.setattr(SpikeGuard, "outlier", outlier)
    break_losses(monkeypatch, {5})
    config = make_config(train__skip_limit="1", train__spike_sigma="6")
    with pytest.raises(UserError) as stopped:
        train(config)
    assert "the loss of step 5 is nan" in str(stopped.value)
    assert "and 1 steps before it were skipped; stopped" in str(stopped.value)
    assert [r["batch"] for r in events(config, "spike_skipped")] == [4]


def test_a_model_that_no_sample_can_be_drawn_from_ends_no_run(
    make_config: ConfigMaker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its logits may break on the sample's prompt alone."""

    def fails(*_: object) -> str:
        raise UserError("the model's logits are not finite")

    monkeypatch.setattr(gpt.train, "sample", fails)
    config = make_config()
    train(config)
    assert "warning: no sample: the model's logits are not finite" in capsys.readouterr().err
    assert checkpoint_folders(run_of(config))[-1].name == "step-00000012"
    assert events(config, "sample") == []
