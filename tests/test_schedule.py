"""torch's schedulers against the closed form, at every step, resumed anywhere, past the end."""

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from gpt.errors import UserError
from gpt.schedule import (
    MAX_WALK,
    TOLERANCE,
    Plan,
    advance_scheduler,
    build_scheduler,
    check_plan,
    load_scheduler,
    tolerance,
    walk,
)
from gpt.shapes import ProportionalCosine
from tests.test_plan import GOLDEN, NAMES, plans
from tests.torture.any_schedule import rates, run

peaks_lists = st.lists(st.floats(1e-6, 10), min_size=1, max_size=3)


def build(plan: Plan, peaks: list[float]):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_scheduler(optimizer, plan)
    return optimizer, scheduler


@given(plans(80), peaks_lists)
@settings(max_examples=150)
def test_torch_agrees_with_the_closed_form_at_every_step(plan, peaks):
    seen = run(*build(plan, peaks), plan.total_steps + 12)
    for index, peak in enumerate(peaks):
        # The chapter's one floor can be above a group's peak: the larger of both is the measure.
        slack = TOLERANCE * max(peak, plan.floor_ratio * peak, plan.floor_rate or 0)
        mine = [now[index] for now in seen]
        for step, rate in enumerate(mine):
            assert abs(rate - plan.rate(step, peak)) <= slack
        past = mine[plan.total_steps :]
        assert past == past[:1] * 12, "past the end the rate stays"
        assert past[0] <= mine[plan.total_steps - 1] + slack, "rises after its end"


@given(plans(40), peaks_lists, st.data())
@settings(max_examples=120)
def test_resume_is_exact_at_every_step(plan, peaks, data):
    stop = data.draw(st.integers(0, plan.total_steps + 3))
    optimizer, scheduler = build(plan, peaks)
    before = run(optimizer, scheduler, stop)
    state = json.loads(json.dumps(scheduler.state_dict()))
    saved_optimizer = optimizer.state_dict()
    after = run(optimizer, scheduler, plan.total_steps + 10 - stop)
    optimizer, scheduler = build(plan, peaks)
    optimizer.load_state_dict(saved_optimizer)
    load_scheduler(scheduler, state)
    assert run(optimizer, scheduler, plan.total_steps + 10 - stop) == after
    assert before + after == run(*build(plan, peaks), plan.total_steps + 10)


@given(plans(30), peaks_lists)
@settings(max_examples=50)
def test_its_state_is_plain_data(plan, peaks):
    optimizer, scheduler = build(plan, peaks)
    run(optimizer, scheduler, 3)
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan("warmup_cosine", 10, 3, 0.1, 0.1), ["LinearLR", "ProportionalCosine"]),
        (Plan("warmup_cosine", 10, 0, 0.1, 0.1), ["ProportionalCosine"]),
        (Plan("warmup_cosine", 10, 10, 0.1, 0.1), ["LinearLR"]),
        (Plan("wsd", 10, 3, 0.1, 0.1), ["LinearLR", "ConstantLR", "LambdaLR"]),
        (
            Plan("wsd", 10, 3, 0.1, 0.1, decay_shape="linear"),
            ["LinearLR", "ConstantLR", "LinearLR"],
        ),
        (Plan("wsd", 10, 3, 0.1, 0.1, decay_steps=7), ["LinearLR", "LambdaLR"]),
        (Plan("linear", 10, 3, 0.1, 0.1), ["LinearLR", "LinearLR"]),
        (Plan("constant", 10, 3, 0.1, 0.1), ["LinearLR", "ConstantLR"]),
        (Plan("inverse_sqrt", 10, 3, 0.1, 0.1), ["LinearLR", "LambdaLR"]),
        (Plan("polynomial", 10, 3, 0.1, 0.1, power=2), ["LinearLR", "LambdaLR"]),
        (
            Plan("cosine_restarts", 10, 3, 0.1, 0.1, cycles=2),
            ["LinearLR"] + ["ProportionalCosine"] * 2,
        ),
        (Plan("hf_cosine", 10, 3, 0.1, 0.0), ["LambdaLR", "LambdaLR"]),
        (Plan("chapter", 10, 3, 0.1, 0.1, floor_rate=0.1), ["LinearLR", "CosineAnnealingLR"]),
    ],
)
def test_it_is_made_of_torchs_own_schedulers(plan, expected):
    _, scheduler = build(plan, [1.0])
    assert type(scheduler) is SequentialLR
    kinds = [type(phase).__name__ for phase in scheduler._schedulers]
    assert kinds == [*expected, "ConstantLR"]
    assert issubclass(ProportionalCosine, CosineAnnealingLR)


# The chapter and transformers ------------------------------------------------------------------


def as_in_the_chapter(peaks: list[float], warmup: int, t_max: int, floor: float):
    """Section 17.6.3, with its numbers as arguments."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = torch.optim.AdamW(groups)
    warmup_scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    cosine_scheduler = CosineAnnealingLR(optimizer, T_max=t_max, eta_min=floor)
    scheduler = SequentialLR(
        optimizer, schedulers=[warmup_scheduler, cosine_scheduler], milestones=[warmup]
    )
    return optimizer, scheduler


def test_the_chapter_as_written_at_each_of_its_steps():
    """Its own numbers: 3e-4, 1,000 of 100,000 steps, 1e-5."""
    plan = Plan("chapter", 100_000, 1000, 0.1, 1e-5 / 3e-4, floor_rate=1e-5)
    optimizer, scheduler = as_in_the_chapter([3e-4], 1000, 100_000, 1e-5)
    optimizer.step()
    group = optimizer.param_groups[0]
    for (rate,) in walk(plan, [3e-4]):
        assert rate == group["lr"]
        scheduler.step()
    assert plan.rate(99_999, 3e-4) == pytest.approx(1.00717e-5, rel=1e-5), (
        "its floor is not reached"
    )


@pytest.mark.parametrize("t_max", [1, 2, 7, 70, 89, 90, 91, 400])
def test_the_chapter_with_other_numbers_rising_again_and_for_several_groups(t_max):
    peaks = [1e-2, 1e-3, 1e-6]  # the last below the floor
    plan = Plan("chapter", 100, 10, 0.1, 1e-3, cosine_steps=t_max, floor_rate=1e-5)
    expected = run(*as_in_the_chapter(peaks, 10, t_max, 1e-5), 100)
    assert run(*build(plan, peaks), 100) == expected
    if t_max <= 70:
        assert any(later[0] > sooner[0] for sooner, later in pairwise(expected[10:]))


def transformers_cosine(step: int, warmup: int, total: int) -> float:
    """The formula of `get_cosine_schedule_with_warmup`."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0), (1, 1), (50, 0), (50, 7), (50, 50), (50, 60)]
)
def test_hf_cosine_is_transformers_formula_to_the_bit(total, warmup):
    plan = Plan("hf_cosine", total, warmup, 0.1, 0.0)
    seen = walk(plan, [1.0, 3e-4], total + 5)
    for step, now in enumerate(seen[:total]):
        share = transformers_cosine(step, warmup, total)
        assert now == (share, 3e-4 * share)
    assert seen[total:] == [(0.0, 0.0)] * 5


# Known rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_values_by_hand(case):
    plan, expected = GOLDEN[case]
    seen = walk(plan, [1.0, 2e-3], len(expected))
    assert [rate for rate, _ in seen] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [rate / 2e-3 for _, rate in seen] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_schedule_on_an_optimizer_starts_from_its_peaks(name):
    plan = Plan(name, 20, 5, 0.1, 0.1, cosine_steps=8, floor_rate=1e-4)
    optimizer, scheduler = build(plan, [1e-2, 1e-3])
    first = run(optimizer, scheduler, 25)
    assert run(optimizer, build_scheduler(optimizer, plan), 25) == first


def test_corner_steps():
    plan = Plan("warmup_cosine", 100, 10, 0.1, 0.1)
    seen = [rate for (rate,) in walk(plan, [1e-3])]
    assert seen[0] == pytest.approx(1e-4, rel=1e-12)
    assert seen[9] == pytest.approx(9.1e-4, rel=1e-12)
    assert seen[10] == pytest.approx(1e-3, rel=1e-12)
    assert max(seen) == seen[10]
    assert seen[99] == pytest.approx(1e-4, rel=1e-12)
    assert seen[98] > seen[99]


def test_equals_torchs_plain_cosine_where_one_group_makes_them_the_same():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    plain = CosineAnnealingLR(optimizer, 19, eta_min=0.03)
    expected = run(optimizer, plain, 20)
    ours = walk(Plan("warmup_cosine", 20, 0, 1.0, 0.03 / 0.3), [0.3])
    assert [rate for (rate,) in ours] == pytest.approx([rate for (rate,) in expected], rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"chapter"}))
def test_groups_keep_their_ratio_and_never_rise_to_anothers_floor(name):
    for high, low in walk(Plan(name, 40, 5, 0.1, 0.1), [1e-2, 1e-5]):
        assert high == pytest.approx(1000 * low, rel=1e-9)


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (1, 0, [1.0, 0.1, 0.1]),
        (1, 1, [0.5, 0.1, 0.1]),
        (2, 1, [0.5, 1.0, 0.1, 0.1]),
        (2, 2, [0.5, 0.75, 0.1]),
        (3, 0, [1.0, 0.55, 0.1, 0.1]),
    ],
)
def test_short_runs(total, warmup, expected):
    plan = Plan("warmup_cosine", total, warmup, 0.5, 0.1)
    assert [rate for (rate,) in walk(plan, [1.0], len(expected))] == pytest.approx(expected)


# A state of another plan -----------------------------------------------------------------------

BASE = {"total_steps": 20, "warmup_steps": 5, "start_factor": 0.1, "floor_ratio": 0.1}


@pytest.mark.parametrize(
    ("saved", "now", "word"),
    [
        (
            {"name": "warmup_cosine"},
            {"total_steps": 21},
            "milestones was .5, 20. .* is .5, 21. now",
        ),
        ({"name": "warmup_cosine"}, {"total_steps": 21}, "T_max was 14"),
        ({"name": "warmup_cosine"}, {"floor_ratio": 0.2}, "floor_ratio was 0.1 .* is 0.2 now"),
        ({"name": "warmup_cosine"}, {"start_factor": 0.2}, "start_factor"),
        ({"name": "linear"}, {"floor_ratio": 0.2}, "end_factor"),
        ({"name": "linear"}, {"warmup_steps": 6}, "total_iters was 14 .* is 13"),
        ({"name": "constant"}, {"total_steps": 30}, "milestones"),
        ({"name": "inverse_sqrt"}, {"warmup_steps": 6}, "warmup_steps was 5 .* is 6"),
        ({"name": "inverse_sqrt"}, {"floor_ratio": 0.5}, "floor_ratio"),
        ({"name": "polynomial", "power": 2.0}, {"power": 3.0}, "power was 2.0 .* is 3.0"),
        ({"name": "polynomial", "power": 2.0}, {"floor_ratio": 0.2}, "floor_ratio"),
        ({"name": "polynomial", "power": 2.0}, {"power": 1.0}, "power was 2.0 .* is absent"),
        ({"name": "wsd", "decay_steps": 4}, {"decay_steps": 5}, "milestones"),
        ({"name": "wsd", "decay_steps": 4}, {"decay_steps": 5}, "fall_steps was 4"),
        (
            {"name": "wsd", "decay_steps": 4},
            {"decay_shape": "linear"},
            "fall_steps was 4 .* absent",
        ),
        ({"name": "wsd", "decay_steps": 4}, {"floor_ratio": 0.2}, "floor_ratio"),
        ({"name": "cosine_restarts"}, {"cycles": 5}, "milestones"),
        ({"name": "cosine_restarts"}, {"floor_ratio": 0.2}, "phase 4 floor_ratio"),
        ({"name": "hf_cosine"}, {"total_steps": 21}, "half_period_steps"),
        ({"name": "hf_cosine"}, {"warmup_steps": 6}, "phase 0 warmup_steps"),
        ({"name": "hf_cosine"}, {"name": "warmup_cosine"}, "half_period_steps was 15"),
        ({"name": "chapter", "floor_rate": 1e-5}, {"floor_rate": 2e-5}, "eta_min was 1e-05"),
        ({"name": "chapter", "floor_rate": 1e-5}, {"cosine_steps": 10}, "T_max was 20 .* is 10"),
        ({"name": "chapter", "floor_rate": 1e-5}, {"total_steps": 21}, "held_factor was"),
    ],
)
def test_a_state_of_another_plan_is_refused(saved, now, word):
    peaks = [1.0, 0.01]
    _, old = build(Plan(**(BASE | saved)), peaks)
    optimizer, new = build(Plan(**(BASE | saved | now)), peaks)
    before = json.dumps(new.state_dict())
    with pytest.raises(UserError, match=word):
        load_scheduler(new, old.state_dict())
    assert json.dumps(new.state_dict()) == before
    assert rates(optimizer) == [p * Plan(**(BASE | saved | now)).factor(0) for p in peaks]


@pytest.mark.parametrize("name", NAMES)
def test_other_peaks_are_refused(name):
    _, old = build(Plan(name=name, **BASE), [1.0])
    _, new = build(Plan(name=name, **BASE), [2.0])
    with pytest.raises(UserError, match="base_lrs"):
        load_scheduler(new, old.state_dict())


# Put in the middle of a plan ---------------------------------------------------------------------


@given(plans(40), peaks_lists, st.data())
@settings(max_examples=100)
def test_advancing_is_the_same_as_having_run(plan, peaks, data):
    """Whatever the rates were before: they, and all that follows, are those of the plan."""
    origin = data.draw(st.sampled_from([0, 0, 7]))
    plan = replace(plan, total_steps=plan.total_steps + origin, origin=origin)
    step = data.draw(st.integers(origin, plan.total_steps + 3))
    expected = run(*build(plan, peaks), plan.total_steps + 10 - origin)[step - origin :]
    optimizer, scheduler = build(plan, peaks)
    advance_scheduler(optimizer, scheduler, plan, step)
    assert run(optimizer, scheduler, plan.total_steps + 10 - step) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_that_begins_anew_is_checked_and_walked_from_there(name):
    plan = Plan(name, 140, 10, 0.1, 0.1, cycles=3, origin=100)
    check_plan(plan, [1e-2, 1e-4])
    walked = walk(plan, [1e-2, 1e-4])
    assert walked == walk(plan.rebased, [1e-2, 1e-4])
    assert len(walked) == 40


# Long runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_check_of_a_very_long_plan_takes_seconds(name, monkeypatch):
    monkeypatch.setattr("gpt.schedule.MAX_WALK", 2_000)
    assert MAX_WALK >= 100_000
    started = time.perf_counter()
    for warmup in (0, 1, 20_000_000, 10**9 - 1, 10**9, 2 * 10**9):
        check_plan(Plan(name, 10**9, warmup, 0.1, 0.1, cosine_steps=10**8), [1e-3, 1e-4])
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "plan",
    [
        Plan("warmup_cosine", 60_000, 1_000, 0.1, 0.1),
        Plan("linear", 30_000, 1_000, 0.1, 0.0),
        Plan("wsd", 30_000, 1_000, 0.1, 0.1, decay_steps=25_000, decay_shape="linear"),
        Plan("cosine_restarts", 30_000, 1_000, 0.1, 0.0, cycles=3),
    ],
)
def test_drift_over_a_long_run_stays_within_the_tolerance(plan):
    walk(plan, [1e-3])


@pytest.mark.parametrize(("steps", "drift"), [(600_000, 3e-12), (3_000_000, 1.06e-11)])
def test_the_drift_of_a_run_that_is_too_long_to_walk_here_is_allowed_for(steps, drift):
    """As measured once, of a cosine; it takes half a minute."""
    plan = Plan("warmup_cosine", steps, steps // 50, 0.1, 0.1)
    assert 3 * drift < tolerance(plan, 1.0) < 6 * drift
    assert tolerance(replace(plan, total_steps=1000, warmup_steps=20), 1.0) == TOLERANCE


def test_a_cosine_past_its_floor_drifts_within_its_own_tolerance():
    """torch's recursion loses digits there; the bound must hold, and not by far."""
    plan = Plan("chapter", 22_000, 0, 0.1, 0.1, cosine_steps=10_000, floor_rate=1e-4)
    worst = max(
        abs(rate - plan.rate(step, 1e-3)) for step, (rate,) in enumerate(walk(plan, [1e-3]))
    )
    assert TOLERANCE * 1e-3 < worst < tolerance(plan, 1e-3)
    within = Plan("chapter", 10_000, 0, 0.1, 0.1, cosine_steps=10_000, floor_rate=1e-4)
    assert tolerance(within, 1e-3) == TOLERANCE * 1e-3


def test_a_scheduler_that_strays_is_caught(monkeypatch):
    monkeypatch.setattr(
        "gpt.schedule.ProportionalCosine", lambda o, n, f: CosineAnnealingLR(o, n + 1)
    )
    with pytest.raises(AssertionError, match="warmup_cosine"):
        check_plan(Plan("warmup_cosine", 10, 0, 0.1, 0.1), [1e-3])
