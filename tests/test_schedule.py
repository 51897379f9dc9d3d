"""torch's schedulers against the closed form, at every step, resumed anywhere, past the end."""

import json
import math
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import SequentialLR

from gpt.config import Config
from gpt.errors import UserError
from gpt.schedule import (
    MAX_WALK,
    TOLERANCE,
    Plan,
    ProportionalCosine,
    build_scheduler,
    check_plan,
    load_scheduler,
    walk,
)


@st.composite
def plans(draw: st.DrawFn, longest: int = 150) -> Plan:
    total = draw(st.integers(1, longest))
    near_the_end = st.sampled_from([0, max(0, total - 2), total - 1, total])
    return Plan(
        name=draw(st.sampled_from(["warmup_cosine", "constant"])),
        total_steps=total,
        warmup_steps=draw(st.integers(0, total) | near_the_end),
        start_factor=draw(st.floats(1e-3, 1) | st.just(1.0)),
        floor_ratio=draw(st.floats(0, 1) | st.sampled_from([0.0, 0.1, 1.0])),
    )


peaks_lists = st.lists(st.floats(1e-6, 10), min_size=1, max_size=3)


def build(plan: Plan, peaks: list[float]):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_scheduler(optimizer, plan)
    return optimizer, scheduler


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@given(plans(), peaks_lists)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_torch_agrees_with_the_closed_form_at_every_step(plan, peaks):
    optimizer, scheduler = build(plan, peaks)
    seen = []
    for step in range(plan.total_steps + 30):
        seen.append(rates(optimizer))
        for rate, peak in zip(seen[-1], peaks, strict=True):
            expected = plan.rate(step, peak)
            # Against the rate itself, until it is lost in the cosine's last digits next to 0.
            assert math.isclose(rate, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE * peak)
        optimizer.step()
        scheduler.step()
    slack = TOLERANCE if plan.warmup_steps == plan.total_steps else 0
    past = seen[plan.total_steps - 1 :]
    for before, after in pairwise(past):
        pairs = zip(after, before, peaks, strict=True)
        assert all(a <= b + slack * peak for a, b, peak in pairs), "rises after its end"
    assert seen[plan.total_steps] == seen[-1]


@given(plans(60), peaks_lists, st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_resume_is_exact_at_every_step(plan, peaks, data):
    stop = data.draw(st.integers(0, plan.total_steps + 3))
    optimizer, scheduler = build(plan, peaks)
    straight = []
    for step in range(plan.total_steps + 10):
        if step == stop:
            state = json.loads(json.dumps(scheduler.state_dict()))
            saved_optimizer = optimizer.state_dict()
        straight.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    optimizer, scheduler = build(plan, peaks)
    optimizer.load_state_dict(saved_optimizer)
    load_scheduler(scheduler, state)
    resumed = []
    for _ in range(stop, plan.total_steps + 10):
        resumed.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    assert resumed == straight[stop:]


def test_it_is_made_of_torchs_own_schedulers():
    _, scheduler = build(Plan("warmup_cosine", 10, 3, 0.1, 0.1), [1.0])
    assert type(scheduler) is SequentialLR
    kinds = [type(phase).__name__ for phase in scheduler._schedulers]
    assert kinds == ["LinearLR", "ProportionalCosine", "ConstantLR"]
    assert issubclass(ProportionalCosine, torch.optim.lr_scheduler.CosineAnnealingLR)


def test_corner_steps():
    plan = Plan("warmup_cosine", 100, 10, 0.1, 0.1)
    seen = [rate for (rate,) in walk(plan, [1e-3])]
    assert seen[0] == pytest.approx(1e-4, rel=1e-12)
    assert seen[9] == pytest.approx(9.1e-4, rel=1e-12)
    assert seen[10] == pytest.approx(1e-3, rel=1e-12)
    assert max(seen) == seen[10]
    assert seen[99] == pytest.approx(1e-4, rel=1e-12)
    assert seen[98] > seen[99]


def test_a_known_cosine():
    # 4 steps down from step 1: cos 0, 60, 120, 180 degrees.
    plan = Plan("warmup_cosine", 5, 1, 0.5, 0.2)
    values = [plan.rate(step, 10.0) for step in range(7)]
    assert values == pytest.approx([5.0, 10.0, 8.0, 4.0, 2.0, 2.0, 2.0])


def test_equals_torchs_plain_cosine_where_one_group_makes_them_the_same():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    plain = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 19, eta_min=0.03)
    expected = []
    for _ in range(20):
        expected.append((optimizer.param_groups[0]["lr"],))
        optimizer.step()
        plain.step()
    ours = walk(Plan("warmup_cosine", 20, 0, 1.0, 0.03 / 0.3), [0.3])
    assert [rate for (rate,) in ours] == pytest.approx([rate for (rate,) in expected], rel=1e-12)


def test_groups_keep_their_ratio_and_never_rise_to_anothers_floor():
    for high, low in walk(Plan("warmup_cosine", 40, 5, 0.1, 0.1), [1e-2, 1e-5]):
        assert high / low == pytest.approx(1000, rel=1e-9)


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


def test_constant_stays_at_the_peak():
    seen = walk(Plan("constant", 6, 2, 0.5, 0.1), [2.0], 12)
    assert [rate for (rate,) in seen] == pytest.approx([1.0, 1.5] + [2.0] * 10)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"total_steps": 0}, "max_steps"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"start_factor": 0.0}, "start_factor"),
        ({"start_factor": 1.5}, "start_factor"),
        ({"floor_ratio": -0.1}, "min_lr"),
        ({"floor_ratio": 1.1}, "min_lr"),
    ],
)
def test_impossible_plans_are_refused(change, word):
    numbers = {"total_steps": 10, "warmup_steps": 2, "start_factor": 0.1, "floor_ratio": 0.1}
    with pytest.raises(UserError, match=word):
        Plan(name="warmup_cosine", **(numbers | change))


def test_plan_from_config():
    config = Config.model_validate(
        {
            "optimizer": {"lr": 2e-3},
            "schedule": {"warmup_fraction": 0.05, "min_lr": 5e-4, "start_factor": 0.2},
        }
    )
    assert Plan.from_config(config, 200) == Plan("warmup_cosine", 200, 10, 0.2, 0.25)
    late = Config.model_validate({"schedule": {"warmup_steps": 300}})
    with pytest.raises(UserError, match="warmup of 300"):
        Plan.from_config(late, 200)


@pytest.mark.parametrize(
    ("plan", "peaks", "word"),
    [
        (Plan("warmup_cosine", 21, 5, 0.1, 0.1), [1.0], "milestones"),
        (Plan("warmup_cosine", 20, 5, 0.1, 0.2), [1.0], "floor_ratio"),
        (Plan("warmup_cosine", 20, 5, 0.2, 0.1), [1.0], "start_factor"),
        (Plan("warmup_cosine", 20, 5, 0.1, 0.1), [2.0], "base_lrs"),
    ],
)
def test_a_state_of_another_plan_is_refused(plan, peaks, word):
    _, old = build(Plan("warmup_cosine", 20, 5, 0.1, 0.1), [1.0])
    _, new = build(plan, peaks)
    with pytest.raises(UserError, match=word):
        load_scheduler(new, old.state_dict())


def test_a_step_before_the_first_is_a_bug():
    with pytest.raises(ValueError, match="step -1"):
        Plan("constant", 5, 0, 1.0, 1.0).factor(-1)


def test_the_closed_form_keeps_its_digits_near_a_floor_of_zero():
    plan = Plan("warmup_cosine", 1_000_001, 0, 1.0, 0.0)
    exact = (math.pi / 2 / 1_000_000) ** 2  # sin^2 of a small angle
    assert plan.factor(999_999) == pytest.approx(exact, rel=1e-9)


def test_a_check_of_a_very_long_plan_takes_seconds(monkeypatch):
    monkeypatch.setattr("gpt.schedule.MAX_WALK", 5_000)
    assert MAX_WALK >= 100_000
    started = time.perf_counter()
    for warmup in (0, 1, 20_000_000, 10**9 - 1, 10**9):
        check_plan(Plan("warmup_cosine", 10**9, warmup, 0.1, 0.1), [1e-3, 1e-4])
    assert time.perf_counter() - started < 5


def test_drift_over_a_long_run_stays_within_the_tolerance():
    walk(Plan("warmup_cosine", 60_000, 1_000, 0.1, 0.1), [1e-3])
