"""The label of each rate, on curves made up for each case."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpt.lr.labels import Verdict, judge
from gpt.lr.outcome import Run
from gpt.metrics import METRICS_NAME, read_metrics

START, UNIGRAM, STEPS = 5.55, 3.3, 400


def make_run(
    lr: float,
    end: float,
    *,
    seed: int = 1,
    pace: float = 0.2,
    bump: float = 0.0,
    noise: float = 0.05,
) -> Run:
    """A loss that falls from START to `end`, most of it in the share `pace` of the run.

    `bump` nats are added half-way, for a tenth of the run.
    """
    steps = list(range(1, STEPS + 1, 4))
    losses = []
    for step in steps:
        loss = end + (START - end) * math.exp(-step / STEPS / pace)
        loss += bump * math.exp(-(((step / STEPS - 0.5) / 0.05) ** 2))
        losses.append(loss + (noise * math.sin(12.9898 * step) if step > 1 else 0))
    evals = list(range(50, STEPS + 1, 50))
    val = [end + (START - end) * math.exp(-step / STEPS / pace) for step in evals]
    val[-1] = end
    return Run(lr, seed, (steps, losses), (evals, val), (1.0,) * len(steps), end)


def broken(lr: float, seed: int = 1) -> Run:
    return Run(lr, seed, ([1, 5], [START, 9.0]), ([], []), (1.0, 90.0), None, "loss nan at step 7")


def labels(verdict: Verdict) -> list[str]:
    return [rate.label for rate in verdict.rates]


def evidence(verdict: Verdict, lr: float) -> str:
    return next(rate.evidence for rate in verdict.rates if rate.lr == lr)


def test_all_four_labels_side_by_side() -> None:
    verdict = judge(
        [
            broken(1.0),
            make_run(1e-5, 4.6),
            make_run(1e-4, 2.5),
            make_run(1e-3, 2.0),
            make_run(3e-3, 2.015),
            make_run(3e-2, 2.6, bump=1.5),
        ],
        UNIGRAM,
    )
    assert labels(verdict) == ["too_small", "too_small", "right", "right", "too_large", "diverged"]
    assert verdict.best == 1e-3
    assert verdict.tolerance == pytest.approx(0.02)
    assert evidence(verdict, 1e-4) == "+25.0%; smooth; 1.0e-03 is there after 50% of the steps"
    assert evidence(verdict, 3e-3) == "+0.8%, within 1 %"
    assert "climbs 1." in evidence(verdict, 3e-2)
    assert "by step 20" in evidence(verdict, 3e-2)
    assert evidence(verdict, 1.0) == "loss nan at step 7"
    assert verdict.notes == ()
    assert verdict.next_lrs == ()


def test_a_loss_that_left_its_start_and_ends_there_has_diverged() -> None:
    back = make_run(1e-1, 5.5, bump=-2.0)
    assert back.lost == "ends at 5.50, began at 5.55"
    above = make_run(1.0, 7.0)
    verdict = judge([make_run(1e-3, 2.0), make_run(1e-2, 2.5), back, above], UNIGRAM)
    assert labels(verdict) == ["right", "too_large", "diverged", "diverged"]


def test_a_loss_that_never_left_its_start() -> None:
    """Below a rate that learns it is too small a rate; above, it is dead."""
    low, high = make_run(1e-8, 5.53, noise=0.01), make_run(10.0, 5.54, noise=0.01)
    assert not low.lost
    verdict = judge([low, make_run(1e-3, 2.0), high], UNIGRAM)
    assert labels(verdict) == ["too_small", "right", "diverged"]
    assert "stays where it began" in evidence(verdict, 1e-8)
    assert verdict.label_of(high) == "diverged"


def test_only_idle_rates_are_all_too_small_whatever_the_noise_between_them() -> None:
    runs = [
        make_run(lr, end, noise=0.01) for lr, end in ((1e-9, 5.54), (1e-8, 5.539), (1e-7, 5.541))
    ]
    verdict = judge(runs, UNIGRAM)
    assert labels(verdict) == ["too_small"] * 3
    assert "no rate is right" in verdict.notes[0]


def test_falling_but_ignorant_at_the_top_of_a_small_grid_is_too_small() -> None:
    verdict = judge([make_run(1e-5, 4.6), make_run(1e-4, 3.2)], UNIGRAM)
    assert labels(verdict) == ["too_small"] * 2
    assert labels(judge([make_run(1e-5, 3.2), make_run(1e-4, 2.5)], UNIGRAM)) == [
        "too_small",
        "right",
    ]
    assert verdict.best == 1e-4, "best is still the lowest of what was tried"
    assert "no rate is right: even 1.0e-04, the best, is too small" in verdict.notes
    assert verdict.next_lrs == (3e-4, 1e-3)


def test_as_steep_as_before_at_the_top_of_the_grid_is_too_small() -> None:
    steep = [make_run(1e-5, 2.9), make_run(1e-4, 2.5), make_run(1e-3, 2.1)]
    assert labels(judge(steep, UNIGRAM)) == ["too_small"] * 3
    flattening = [make_run(1e-5, 2.9), make_run(1e-4, 2.3), make_run(1e-3, 2.1)]
    verdict = judge(flattening, UNIGRAM)
    assert labels(verdict) == ["too_small", "too_small", "right"]
    assert verdict.notes == ("1.0e-03 is the highest tried; the right rate may lie above",)
    bounded = judge([*steep, make_run(1e-2, 2.4)], UNIGRAM)
    assert labels(bounded) == ["too_small", "too_small", "right", "too_large"]


def test_dead_at_the_tokens_frequencies_is_too_large_even_for_the_best() -> None:
    dead = [
        make_run(0.1, 3.32, pace=0.02),
        make_run(0.3, 3.3, pace=0.02),
        make_run(1.0, 3.36, pace=0.02),
    ]
    verdict = judge(dead, UNIGRAM)
    assert labels(verdict) == ["too_large"] * 3
    assert "the tokens' frequencies" in evidence(verdict, 0.3)
    assert verdict.next_lrs == (0.01, 0.033)
    # The same curve in a text that has no more to learn, above a rate that is still on its way.
    verdict = judge([make_run(0.01, 3.5), make_run(0.1, 3.29, pace=0.02)], UNIGRAM)
    assert labels(verdict) == ["too_small", "right"]


def test_unstable_all_the_way_down_is_too_large() -> None:
    runs = [make_run(0.1, 2.9, bump=2.0), make_run(0.3, 3.1, bump=2.0)]
    assert labels(judge(runs, UNIGRAM)) == ["too_large", "too_large"]
    bracketed = judge([make_run(0.02, 3.1), *runs], UNIGRAM)
    assert labels(bracketed) == ["too_small", "right", "too_large"]
    assert "climbs" in evidence(bracketed, 0.1)
    far = judge([make_run(1e-6, 5.5, noise=0.0), *runs], UNIGRAM)
    assert labels(far) == ["too_small", "too_large", "too_large"]
    assert "nothing was tried between 1.0e-06 and 1.0e-01" in far.notes


def test_one_lost_seed_spoils_its_rate_but_not_its_sister_run() -> None:
    sound = make_run(1e-2, 1.5, seed=2)
    verdict = judge(
        [make_run(1e-3, 2.0), make_run(1e-3, 2.0, seed=2), broken(1e-2), sound], UNIGRAM
    )
    assert verdict.best == 1e-3
    assert labels(verdict) == ["right", "diverged"]
    assert evidence(verdict, 1e-2) == "1 of 2 seeds: loss nan at step 7"
    assert verdict.label_of(sound) == "too_large"


def test_seeds_that_disagree_widen_what_counts_as_right() -> None:
    def at(lr: float, ends: Sequence[float]) -> list[Run]:
        return [make_run(lr, end, seed=seed) for seed, end in enumerate(ends)]

    steady = judge([*at(1e-3, (2.0, 2.001)), *at(3e-3, (2.03, 2.031))], UNIGRAM)
    assert labels(steady) == ["right", "too_large"]
    noisy = judge([*at(1e-3, (1.98, 2.02)), *at(3e-3, (2.03, 2.031))], UNIGRAM)
    assert labels(noisy) == ["right", "right"]
    assert "within the seeds' spread" in evidence(noisy, 3e-3)
    # The noise of the bad rate itself is no excuse.
    wild = judge([*at(1e-3, (2.0, 2.001)), *at(3e-2, (2.1, 3.5))], UNIGRAM)
    assert labels(wild) == ["right", "too_large"]


def test_overfitting_is_named() -> None:
    run = make_run(1e-2, 2.6)
    run.val[1][3] = 2.1
    verdict = judge([make_run(1e-3, 2.0), run], UNIGRAM)
    assert "val loss rises from 2.1000 at step 200" in evidence(verdict, 1e-2)
    assert "rises" not in evidence(verdict, 1e-3)


def test_all_diverged_has_no_best() -> None:
    verdict = judge([broken(1.0), broken(0.1)], UNIGRAM)
    assert labels(verdict) == ["diverged", "diverged"]
    assert verdict.best is None
    assert verdict.next_lrs == (1e-4, 1e-3, 1e-2)


def test_nothing_yet() -> None:
    assert judge([], UNIGRAM).rates == ()


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_noise_alone_is_no_climb(noise: float) -> None:
    assert make_run(1e-3, 2.0, noise=noise).climb == (0.0, 0)
    rise, top = make_run(1e-3, 2.0, noise=noise, bump=3.0).climb
    assert 2 < rise < 3.5
    assert 180 <= top <= 220


def test_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": 1, "loss": 5.5, "grad_norm": 2.0},
        {"kind": "eval", "step": 4, "val_loss": 4.0},
        {"kind": "train", "step": 5, "loss": 4.5, "grad_norm": 3.0},
        {"kind": "event", "event": "sample", "step": 5, "text": "x"},
        {"kind": "eval", "step": 8, "val_loss": 4.25},
    ]
    path = tmp_path / METRICS_NAME
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run.from_records(1e-3, 7, read_metrics(tmp_path))
    assert (run.lr, run.seed, run.start, run.val_loss, run.best) == (1e-3, 7, 5.5, 4.25, (4, 4.0))
    assert run.grad_norms == (2.0, 3.0)
    with path.open("a") as file:
        event = {"step": 8, "what": "gradient", "grad_norm": "Infinity", "loss": 4.2}
        file.write(json.dumps({"kind": "event", "event": "nonfinite"} | event) + "\n")
    passed_over = Run.from_records(1e-3, 7, read_metrics(tmp_path))
    assert (passed_over.val_loss, passed_over.lost) == (4.25, "")
    with path.open("a") as file:
        file.write(json.dumps({"kind": "event", "event": "diverged"} | event) + "\n")
    lost = Run.from_records(1e-3, 7, read_metrics(tmp_path))
    assert lost.val_loss is None
    assert lost.lost == "gradient inf at step 9"
    path.write_text('{"kind": "eval", "step": 8, "val_loss": "NaN"}\n')
    lost = Run.from_records(1e-3, 7, read_metrics(tmp_path))
    assert (lost.val_loss, lost.lost) == (None, "validation loss nan at the end")
