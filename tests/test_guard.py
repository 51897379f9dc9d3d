"""Which steps the guard refuses, and that a run with one is well off."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt.train
from gpt.batches import Batches
from gpt.checkpoint import Progress
from gpt.config import Config
from gpt.errors import Stopped
from gpt.guard import LEAST, WINDOW, SpikeGuard
from gpt.metrics import read_metrics
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_resume import final_state, logged, stop_at

POISONED = 150  # steps that are done before the batch that is


def with_history(losses: list[float], norms: list[float], limit: int = 5) -> SpikeGuard:
    progress = Progress()
    guard = SpikeGuard(6, limit, progress)
    for loss, norm in zip(losses, norms, strict=True):
        guard.took(loss, norm)
    return guard


def test_six_sigma_above_the_mean_is_too_many() -> None:
    rng = np.random.default_rng(0)
    losses, logs = rng.normal(3, 0.1, WINDOW), rng.normal(0, 0.2, WINDOW)
    norms = np.exp(logs)
    guard = with_history(losses.tolist(), norms.tolist())
    loss_limit = losses.mean() + 6 * losses.std(ddof=1)
    norm_limit = float(np.exp(logs.mean() + 6 * logs.std(ddof=1)))
    assert guard.outlier(loss_limit - 1e-6, norm_limit - 1e-6) == ""
    assert guard.outlier(loss_limit + 1e-6, 1).startswith("loss 3.")
    assert "6.0 sigma above" in guard.outlier(loss_limit + 1e-6, 1)
    assert guard.outlier(3, norm_limit + 1e-6).startswith("log of the gradient norm 1.")
    assert guard.outlier(-100, 0) == "", "below is well"


def test_the_window_moves_and_what_is_known_must_be_enough() -> None:
    rng = np.random.default_rng(1)
    early = rng.normal(9, 0.1, 300)
    guard = with_history([*early, *rng.normal(3, 0.1, WINDOW)], [1.0] * (300 + WINDOW))
    assert guard.outlier(9, 1) != "", "what is older than the window is forgotten"
    few = with_history([3.0 + 0.01 * i for i in range(LEAST - 1)], [1.0] * (LEAST - 1))
    assert few.outlier(1e9, 1e9) == ""
    few.took(3.0, 1.0)
    assert few.outlier(1e9, 1) != ""


def test_equal_values_are_rounding_and_no_outliers() -> None:
    guard = with_history([3.0] * WINDOW, [1.0] * WINDOW)
    assert guard.outlier(3.01, 1) == ""
    assert "inf sigma above 3" in guard.outlier(3.1, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_finite_values_are_remembered(value: float) -> None:
    progress = Progress()
    guard = SpikeGuard(6, 5, progress)
    guard.took(value, 1.0)
    guard.took(1.0, value)
    assert progress.guard_losses == progress.guard_norms == []
    guard.took(1.0, 2.0)
    assert (progress.guard_losses, progress.guard_norms) == ([1.0], [2.0])


def test_after_the_limit_the_level_is_taken_for_the_new_one() -> None:
    progress = Progress(skips_in_row=4)
    guard = SpikeGuard(6, 5, progress)
    for i in range(WINDOW):
        guard.took(3 + 0.01 * (i % 7), 1)
    assert guard.outlier(20, 1) != ""
    progress.skips_in_row = 5
    assert guard.outlier(20, 1) == ""


def skipped_after_a_jump(height: float, limit: int, steps: int) -> list[bool]:
    """Which steps are skipped, of those from where the loss is higher by `height` for good."""
    rng, progress = np.random.default_rng(2), Progress()
    guard = SpikeGuard(6, limit, progress)
    for loss in rng.normal(3, 0.05, WINDOW).tolist():
        guard.took(loss, 1)
    skipped = []
    for loss in (height + rng.normal(3, 0.05, steps)).tolist():
        skipped.append(guard.outlier(loss, 1) != "")
        if skipped[-1]:
            progress.skips_in_row += 1
        else:
            guard.took(loss, 1)
            progress.skips_in_row = 0
    assert guard.outlier(20, 1) != "", "the new level is known"
    return skipped


@pytest.mark.parametrize("height", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("limit", [1, 5])
def test_a_jump_that_lasts_costs_no_more_than_the_limit(height: float, limit: int) -> None:
    assert skipped_after_a_jump(height, limit, 100) == [True] * limit + [False] * (100 - limit)


def test_other_skips_before_a_usual_step_leave_the_level_known() -> None:
    """As those of a loss that is not finite, which count among the same."""
    progress = Progress()
    guard = SpikeGuard(6, 5, progress)
    for i in range(WINDOW):
        guard.took(3 + 0.01 * (i % 7), 1)
    progress.skips_in_row = 5
    guard.took(3, 1)
    progress.skips_in_row = 0
    assert len(progress.guard_losses) == WINDOW
    assert guard.outlier(20, 1) != ""


@pytest.mark.parametrize("heavy", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_loses_at_most_one_step_in_5000(seed: int, heavy: float) -> None:
    """A falling loss with Gaussian noise and some of Student-t(5), log-normal gradient norms."""
    rng, steps = np.random.default_rng(seed), 5000
    losses = 2.2 + 6.1 / np.sqrt(np.arange(steps) / 20 + 1)
    losses += 0.05 * rng.normal(size=steps) + heavy * rng.standard_t(5, size=steps)
    norms = 0.6 * np.exp(0.4 * rng.normal(size=steps))
    progress = Progress()
    guard = SpikeGuard(6, 5, progress)
    refused = 0
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        if guard.outlier(loss, norm):
            refused += 1
        else:
            guard.took(loss, norm)
    assert refused <= 1


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """One batch of a run becomes noise, once with each of its ids in a place of its own."""
    whole = Batches.batch

    def batch(self: Batches, step: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        inputs, targets = whole(self, step, rows)
        if step == at:
            generator = torch.Generator().manual_seed(0)
            inputs, targets = (
                torch.randint(128, 257, inputs.shape, generator=generator) for _ in range(2)
            )
        return inputs, targets

    monkeypatch.setattr(Batches, "batch", batch)


def settings(make_config: ConfigMaker, name: str, sigma: str, **changes: str) -> Config:
    values = {
        "run__name": name,
        "run__seed": "7",
        "train__spike_sigma": sigma,
        "train__max_steps": "300",
        "optimizer__lr": "1e-2",
        "schedule__warmup_steps": "20",
        "train__grad_clip": "null",
        "eval__every_steps": "300",
        "eval__max_tokens": "null",
        "checkpoint__every_steps": "300",
        "log__every_steps": "10",
    }
    return make_config(**(values | changes))


def final_loss(config: Config) -> float:
    records = read_metrics(Path(config.run.dir) / config.run.name)
    return float([r["val_loss"] for r in records if r["kind"] == "eval"][-1])


def events(config: Config, name: str) -> list[dict[str, Any]]:
    records = read_metrics(Path(config.run.dir) / config.run.name)
    return [record for record in records if record.get("event") == name]


def state(config: Config, step: int) -> dict[str, Any]:
    folder = Path(config.run.dir) / config.run.name / "checkpoints" / f"step-{step:08d}"
    answer: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return answer


def test_a_poisoned_batch_is_passed_over_and_costs_nothing(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt.train, "report", lambda *_: None)
    clean = settings(make_config, "clean", "6")
    train(clean)
    assert events(clean, "spike_skipped") == []
    poison(monkeypatch, POISONED)
    guarded = settings(make_config, "guarded", "6")
    open_ = settings(make_config, "open", "null")
    train(guarded)
    train(open_)
    losses = {c.run.name: final_loss(c) for c in (clean, guarded, open_)}
    print({name: round(loss - losses["clean"], 4) for name, loss in losses.items()})
    assert losses["guarded"] == pytest.approx(losses["clean"], abs=0.02)
    assert losses["open"] > losses["clean"]
    (skipped,) = events(guarded, "spike_skipped")
    assert skipped["step"] == POISONED
    assert skipped["loss"] > 5
    assert "sigma above" in skipped["why"]
    assert events(open_, "spike_skipped") == []
    progress, expected = (state(config, 300)["progress"] for config in (guarded, clean))
    assert (progress["step"], progress["tokens"]) == (300, expected["tokens"])
    assert (progress["skipped_batches"], progress["skips_in_row"]) == (1, 0)
    assert len(progress["guard_losses"]) == len(progress["guard_norms"]) == WINDOW
    rates = [
        [line["lr"] for line in logged(config) if line["kind"] == "train"]
        for config in (guarded, clean)
    ]
    assert rates[0] == rates[1], "the schedule does not move in a step that is not taken"
    line = next(r for r in logged(guarded) if r["kind"] == "train" and r["step"] == 160)
    assert line["skipped"] == 1
    assert float(str(line["loss_max"])) < 5, "what was skipped does not count"


def test_a_guarded_run_goes_on_as_if_it_had_not_stopped(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the poisoned batch, right behind it, and later: the memory is saved too."""
    monkeypatch.setattr(gpt.train, "report", lambda *_: None)
    poison(monkeypatch, 60)
    changes = {"train__max_steps": "80", "model__dropout": "0.1"}
    whole, parts = (settings(make_config, name, "6", **changes) for name in ("whole", "parts"))
    train(whole)
    assert len(events(whole, "spike_skipped")) == 1
    stops = [45, 60, 70]
    stop_at(monkeypatch, stops)
    for _ in range(3):
        with pytest.raises(Stopped):
            train(parts)
    train(parts)
    assert not stops
    assert final_state(whole, 80) == final_state(parts, 80)
    assert logged(whole) == logged(parts)
    assert len(events(parts, "spike_skipped")) == 1


def test_norms_of_zero_and_losses_near_zero_are_judged_without_a_fuss() -> None:
    zeros = with_history([3.0] * WINDOW, [0.0] + [1.0] * (WINDOW - 1))
    assert zeros.outlier(3.0, 5.0) == "", "zero has no logarithm: norms are not judged"
    rounding = with_history([0.0] * WINDOW, [1.0] * WINDOW)
    assert rounding.outlier(0.005, 1.005) == ""
    assert rounding.outlier(0.007, 1.0) != ""
