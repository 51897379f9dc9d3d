"""Comparing runs: the intervals hold what they promise, and say what they do not."""

import math
from typing import Any

import numpy as np
import pytest

from gpt.history import Column, History, history_of
from gpt.report.compare import NO_DIFFERENCE, compare, differences
from gpt.report.config_keys import differing_keys, keys_of, unique_names
from gpt.report.intervals import (
    LEAST_VALUES,
    effective_size,
    sample_interval,
    series_interval,
    t_quantile,
    two_samples_interval,
)
from tests.report_runs import config_of


def correlated(rng: np.random.Generator, count: int, correlation: float) -> Column:
    """A series with mean 0 whose values resemble the ones before them."""
    noise = rng.standard_normal(count + 100)
    values = np.zeros(count + 100)
    for index in range(1, count + 100):
        values[index] = correlation * values[index - 1] + noise[index]
    return values[100:]


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042)],
)
def test_t_quantiles(freedom: float, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=2e-3)
    assert t_quantile(freedom + 0.3) < t_quantile(freedom)


def test_t_becomes_normal() -> None:
    assert t_quantile(1e9) == pytest.approx(1.95996, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "correlation", "least"),
    [(8, 0.0, 0.92), (8, 0.5, 0.88), (25, 0.5, 0.92), (100, 0.8, 0.88), (400, 0.9, 0.86)],
)
def test_the_interval_of_a_series_holds_its_mean(
    count: int, correlation: float, least: float
) -> None:
    rng = np.random.default_rng(5)
    found = [series_interval(correlated(rng, count, correlation)) for _ in range(300)]
    held = sum(each.low <= 0 <= each.high for each in found) / len(found)
    assert held >= least
    naive = [sample_interval(correlated(rng, count, correlation)) for _ in range(300)]
    if correlation >= 0.5:
        assert sum(each.low <= 0 <= each.high for each in naive) / 300 < held


@pytest.mark.parametrize(("correlation", "share"), [(0.0, 1.0), (0.5, 1 / 3), (0.8, 1 / 9)])
def test_effective_size(correlation: float, share: float) -> None:
    rng = np.random.default_rng(1)
    sizes = [effective_size(correlated(rng, 2000, correlation)) for _ in range(10)]
    assert np.mean(sizes) == pytest.approx(2000 * share, rel=0.2)


def test_intervals_of_little_are_unknown() -> None:
    short = series_interval(np.arange(LEAST_VALUES - 1.0))
    assert not short.is_known
    assert not short.excludes_zero
    assert short.record()["low"] is None
    assert math.isnan(series_interval(np.empty(0)).mean)
    assert not sample_interval(np.array([1.0])).is_known
    level = series_interval(np.full(20, 0.25))
    assert (level.low, level.mean, level.high) == (0.25, 0.25, 0.25)
    assert effective_size(np.full(20, 0.25)) == 20
    same = series_interval(np.zeros(20))
    assert not same.excludes_zero


def test_intervals_of_samples() -> None:
    mean = sample_interval(np.array([1.0, 2.0, 3.0]))
    assert mean.high - mean.mean == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-3)
    # Welch 1947: t with about 2.94 degrees of freedom.
    gap = two_samples_interval(np.array([1.0, 2.0, 3.0]), np.array([11.0, 14.0, 17.0]))
    assert gap.mean == pytest.approx(12)
    error = math.sqrt(1 / 3 + 9 / 3)
    freedom = (1 / 3 + 3) ** 2 / ((1 / 3) ** 2 / 2 + 3**2 / 2)
    assert gap.high - gap.mean == pytest.approx(t_quantile(freedom) * error)
    assert two_samples_interval(np.ones(3), np.ones(3)).low == 0


def curve(
    seed: int = 1, shift: float = 0.0, *, steps: int = 400, name: str = "", **changes: str
) -> History:
    """A run whose batches make noise by its seed; `shift` is what its config is worth."""
    batches = np.random.default_rng(seed)
    own = np.random.default_rng(abs(hash((seed, shift, steps))) % 2**32)
    lines: list[dict[str, Any]] = []
    level = 0.05 * batches.standard_normal()
    for step in range(1, steps + 1):
        loss = 3 + level + shift + 0.3 * batches.standard_normal() + 0.01 * own.standard_normal()
        lines.append({"kind": "train", "step": step, "loss": loss})
        if step % 5 == 0:
            value = 3 + level + shift + 0.003 * own.standard_normal()
            lines.append({"kind": "eval", "step": step, "val_loss": value, "val_bpb": value / 2})
    config = config_of(run__seed=str(seed), **changes)
    return history_of(lines, config, name=name or f"s{seed}{shift:+}")


def test_runs_of_the_same_batches_are_paired() -> None:
    base, better = curve(), curve(shift=-0.02, optimizer__lr="1e-3")
    comparison = compare([base, better])
    (pair,) = comparison.pairs
    assert pair.same_batches
    assert pair.differing == {"optimizer.lr": (3e-4, 1e-3)}
    assert comparison.differing == {"optimizer.lr": (3e-4, 1e-3)}
    evaluations, training = pair.gaps
    assert (evaluations.what, training.what) == ("evaluations", "training losses")
    for gap in pair.gaps:
        assert gap.interval.mean == pytest.approx(-0.02, abs=0.004)
        assert gap.interval.excludes_zero
        assert gap.first_step > 300
    # The noise of the batches, 0.3, is gone.
    assert training.interval.high - training.interval.low < 0.01
    words = pair.words()[0]
    assert f"{better.name} is 0.0" in words
    assert "below" in words
    assert "95 %" in words


def test_no_difference_is_said_plainly() -> None:
    first, second = curve(), curve(shift=1e-9, name="again", log__every_steps="1")
    pair = compare([first, second]).pairs[0]
    assert NO_DIFFERENCE in pair.words()[0]
    assert not pair.gaps[0].record()["is_difference"]
    assert pair.differing == {}


def test_other_batches_are_not_paired() -> None:
    pair = compare([curve(), curve(2, optimizer__lr="1e-3")]).pairs[0]
    assert pair.same_batches is False
    assert [gap.what for gap in pair.gaps] == ["evaluations"]
    assert any("different batches" in note for note in pair.notes)
    batch = compare([curve(), curve(train__batch_size="8")]).pairs[0]
    assert batch.same_batches is False
    skipped = curve(optimizer__lr="1e-3")
    event = {"kind": "event", "step": 50, "event": "spike_skipped"}
    skipped = History(**{**skipped.__dict__, "events": (event,)})
    assert compare([curve(), skipped]).pairs[0].same_batches is False


def test_other_tokenizers_are_compared_in_bits_per_byte() -> None:
    other = curve(shift=0.5, tokenizer__kind="chars")
    comparison = compare([curve(), other])
    assert comparison.unit == "bits per byte"
    assert any("bits per byte" in note for note in comparison.notes)
    (gap,) = comparison.pairs[0].gaps
    assert gap.unit == "bits per byte"
    assert gap.interval.mean == pytest.approx(0.25, abs=0.01)
    assert "bits per byte above" in gap.words("a", "b")


def test_few_evaluations_have_no_interval() -> None:
    short = compare([curve(steps=30), curve(shift=1.0, steps=30, optimizer__lr="1")]).pairs[0]
    evaluations = short.gaps[0]
    assert not evaluations.interval.is_known
    assert "fewer than the 8" in evaluations.words("a", "b")


def test_runs_of_other_lengths_are_compared_up_to_the_shorter() -> None:
    pair = compare([curve(), curve(steps=200, optimizer__lr="1")]).pairs[0]
    assert pair.gaps[0].last_step <= 200
    assert any("end at different steps" in note for note in pair.notes)


def test_nothing_in_common_is_said() -> None:
    one = history_of([{"kind": "train", "step": 1, "loss": 1.0}], name="one")
    two = history_of([{"kind": "train", "step": 2, "loss": 1.0}], name="two")
    comparison = compare([one, two])
    assert comparison.pairs[0].gaps == ()
    assert "no step" in comparison.pairs[0].words()[0]
    assert comparison.pairs[0].same_batches is None
    assert any("not written" in note for note in comparison.notes)
    nan = history_of([{"kind": "train", "step": 1, "loss": math.nan}], name="nan")
    assert compare([one, nan]).pairs[0].gaps == ()


def test_seeds_are_grouped_and_paired_by_seed() -> None:
    runs = [curve(seed) for seed in (1, 2, 3)]
    runs += [curve(seed, -0.03, optimizer__lr="1e-3") for seed in (1, 2, 3)]
    comparison = compare(runs)
    assert [group.seeds for group in comparison.seeds] == [(1, 2, 3), (1, 2, 3)]
    labels = ["optimizer.lr 0.0003", "optimizer.lr 0.001"]
    assert [group.label for group in comparison.seeds] == labels
    (gap,) = comparison.seed_gaps
    assert gap.by_seed
    assert gap.interval.mean == pytest.approx(-0.03, abs=0.005)
    assert gap.interval.excludes_zero
    group = comparison.seeds[0].interval
    assert group.high - group.low > 0.02, "what seeds change is more than what is left in pairs"
    assert [(pair.run, pair.against) for pair in comparison.pairs] == [
        (runs[3 + i].name, runs[i].name) for i in range(3)
    ]
    assert "mean of 3 seeds" in comparison.seeds[0].words()
    assert comparison.record()["seed_gaps"][0]["paired_by_seed"] is True


def test_seeds_that_are_not_shared() -> None:
    runs = [curve(seed) for seed in (1, 2, 3)]
    runs += [curve(seed, 2.0, optimizer__lr="1e-3") for seed in (4, 5)]
    comparison = compare(runs)
    (gap,) = comparison.seed_gaps
    assert not gap.by_seed
    assert gap.interval.excludes_zero
    assert "5 runs" in gap.words()
    only = compare([curve(1), curve(2), curve(3)])
    assert only.pairs == ()
    assert len(only.seeds) == 1
    assert only.seed_gaps == ()


def test_names_are_told_apart() -> None:
    runs = [curve(name="x"), curve(name="x"), curve(name="y")]
    assert unique_names(runs) == ["x", "x (2)", "y"]


def test_keys_that_say_nothing_of_learning_do_not_differ() -> None:
    one, two = curve(), curve(log__every_steps="3", data__dir="elsewhere", eval__patience="4")
    assert differing_keys([keys_of(one), keys_of(two)]) == {}
    assert differing_keys([keys_of(one), {}]) == {}


def test_differences_are_taken_where_both_are_finite() -> None:
    def run(*losses: float) -> History:
        return history_of(
            [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        )

    steps, values = differences(run(1, 2, math.nan, 5).train, run(1, 1, 1).train, "loss")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [0, 1]
