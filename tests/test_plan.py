"""Schedules in closed form: values worked out by hand, what must hold for each shape, lengths."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import Config, ScheduleName, contradictions, schedule_problems
from gpt.errors import UserError
from gpt.plan import Plan

NAMES = get_args(ScheduleName)


@st.composite
def plans(
    draw: st.DrawFn, longest: int = 120, names: tuple[str, ...] = NAMES, *, lawful: bool = False
) -> Plan:
    """Any plan; a `lawful` one has a warmup within the run and no floor above the peak."""
    total = draw(st.integers(1, longest))
    corners = st.sampled_from([0, max(0, total - 2), total - 1, total])
    within = st.integers(0, total // 3) | st.integers(0, total) | corners
    too_long = st.integers(total, 3 * longest)
    floors = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 1.0])
    name = draw(st.sampled_from(names))
    lengths = st.none() | st.integers(1, 2 * longest)
    return Plan(
        name=name,
        total_steps=total,
        warmup_steps=draw(within if lawful else within | too_long),
        start_factor=draw(st.floats(1e-3, 1) | st.just(1.0)),
        floor_ratio=draw(floors if lawful else floors | st.floats(1, 3)),
        decay_steps=draw(lengths),
        decay_shape=draw(st.sampled_from(["sqrt", "linear"])),
        power=draw(st.floats(0.1, 8) | st.sampled_from([1.0, 2.0, 100.0])),
        cycles=draw(st.integers(1, 8) | st.integers(1, 2 * longest)),
        cosine_steps=draw(lengths),
        floor_rate=draw(st.none() | st.floats(0, 1e-3)),
    )


def factors(plan: Plan, past: int = 2) -> list[float]:
    return [plan.factor(step) for step in range(plan.total_steps + past)]


COS30, COS60 = (2 + math.sqrt(3)) / 4, 0.75  # (1 + cos) / 2 of 30 and 60 degrees

GOLDEN = {
    "cosine": (Plan("warmup_cosine", 5, 1, 0.5, 0.2), [0.5, 1, 0.8, 0.4, 0.2, 0.2, 0.2]),
    "cosine, warmup in a line": (
        Plan("warmup_cosine", 7, 4, 0.2, 0.0),
        [0.2, 0.4, 0.6, 0.8, 1, 0.5, 0, 0, 0],
    ),
    "linear": (Plan("linear", 6, 1, 0.1, 0.0), [0.1, 1, 0.75, 0.5, 0.25, 0, 0, 0]),
    "linear to a floor": (Plan("linear", 5, 0, 0.1, 0.2), [1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]),
    "constant": (Plan("constant", 4, 2, 0.5, 0.1), [0.5, 0.75, 1, 1, 1, 1]),
    "squared": (
        Plan("polynomial", 5, 0, 1.0, 0.0, power=2),
        [1, 9 / 16, 1 / 4, 1 / 16, 0, 0, 0],
    ),
    "root of what is left, to a floor": (
        Plan("polynomial", 5, 0, 1.0, 0.5, power=0.5),
        [1, 0.5 + math.sqrt(3) / 4, 0.5 + math.sqrt(2) / 4, 0.75, 0.5, 0.5, 0.5],
    ),
    "wsd, linear tail of 4": (
        Plan("wsd", 9, 2, 0.5, 0.0, decay_steps=4, decay_shape="linear"),
        [0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0],
    ),
    "wsd, sqrt tail of 4": (
        Plan("wsd", 7, 1, 0.5, 0.0, decay_steps=4),
        [0.5, 1, 1, 0.5, 1 - math.sqrt(2) / 2, 1 - math.sqrt(3) / 2, 0, 0, 0],
    ),
    "wsd, sqrt tail to a floor": (
        Plan("wsd", 6, 0, 1.0, 0.2, decay_steps=4),
        [1, 1, 0.6, 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2, 0.2, 0.2],
    ),
    "wsd, a tail of one step": (Plan("wsd", 4, 1, 0.5, 0.1, decay_steps=1), [0.5, 1, 1, 0.1, 0.1]),
    "wsd, all tail": (
        Plan("wsd", 4, 1, 0.5, 0.0, decay_steps=3, decay_shape="linear"),
        [0.5, 1, 0.5, 0, 0],
    ),
    "wsd, a fifth by default": (
        Plan("wsd", 10, 0, 1.0, 0.0, decay_shape="linear"),
        [1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0, 0],
    ),
    "inverse_sqrt": (
        Plan("inverse_sqrt", 17, 4, 0.25, 0.0),
        [0.25, 0.4375, 0.625, 0.8125, 1]
        + [2 / math.sqrt(step) for step in range(5, 17)]
        + [2 / math.sqrt(16)] * 2,
    ),
    "inverse_sqrt stops at its floor": (
        Plan("inverse_sqrt", 6, 1, 0.5, 0.55),
        [0.5, 1, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.55, 0.55, 0.55],
    ),
    "inverse_sqrt without a warmup": (
        Plan("inverse_sqrt", 5, 0, 1.0, 0.0),
        [1, 1, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5, 0.5, 0.5],
    ),
    "restarts": (
        Plan("cosine_restarts", 11, 2, 0.5, 0.0, cycles=3),
        [0.5, 0.75] + [1, 0.5, 0] * 3 + [0, 0],
    ),
    "restarts of unequal length": (
        Plan("cosine_restarts", 7, 0, 1.0, 0.2, cycles=3),
        [1, 0.2, 1, 0.2, 1, 0.6, 0.2, 0.2, 0.2],
    ),
    "hf_cosine": (
        Plan("hf_cosine", 10, 4, 0.1, 0.0),
        [0, 0.25, 0.5, 0.75, 1, COS30, COS60, 0.5, 0.25, 1 - COS30, 0, 0],
    ),
    "chapter: short of its floor at the end": (
        Plan("chapter", 5, 1, 0.1, 0.2, cosine_steps=6),
        [0.1, 1] + [0.2 + 0.8 * height for height in (COS30, COS60, 0.5)] + [0.6, 0.6],
    ),
    "chapter: T_max is all steps by default": (
        Plan("chapter", 4, 1, 0.1, 0.0),
        [0.1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.5, 0.5],
    ),
    "chapter: rises again past T_max": (
        Plan("chapter", 7, 1, 0.1, 0.0, cosine_steps=2),
        [0.1, 1, 0.5, 0, 0.5, 1, 0.5, 0.5, 0.5],
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_values_by_hand(case):
    plan, expected = GOLDEN[case]
    assert [plan.factor(step) for step in range(len(expected))] == pytest.approx(
        expected, rel=1e-14, abs=1e-15
    )


def test_every_shape_has_values_by_hand():
    assert {plan.name for plan, _ in GOLDEN.values()} == set(NAMES)


def test_a_rate_is_a_share_of_the_groups_own_peak():
    plan = Plan("linear", 5, 0, 1.0, 0.2)
    assert plan.rate(4, 1e-2) == pytest.approx(2e-3)
    assert plan.rate(4, 1e-5) == pytest.approx(2e-6)


def test_the_chapters_floor_is_one_rate_for_all_groups():
    plan = Plan("chapter", 4, 1, 0.1, 0.01, cosine_steps=2, floor_rate=1e-5)
    assert plan.rate(3, 1e-3) == pytest.approx(1e-5)
    assert plan.rate(3, 2e-5) == pytest.approx(1e-5)
    assert plan.rate(3, 1e-6) == pytest.approx(1e-5), "a group below the floor rises, as in torch"
    assert plan.factor(3) == pytest.approx(0.01)


# What must hold --------------------------------------------------------------------------------


@given(plans(lawful=True))
@settings(max_examples=150)
def test_warmup_peak_and_end(plan):
    seen = factors(plan, 30)
    assert all(0 <= factor <= 1 + 1e-12 for factor in seen)
    rise = seen[: min(plan.warmup_steps, plan.total_steps)]
    assert all(before <= after + 1e-15 for before, after in pairwise(rise))
    if plan.warmup_steps > 0:
        assert seen[0] == pytest.approx(0 if plan.name == "hf_cosine" else plan.start_factor)
    if plan.warmup_steps < plan.total_steps:
        assert seen[plan.warmup_steps] == pytest.approx(1, abs=1e-15)
    past = seen[plan.total_steps :]
    assert past == past[:1] * 30, "past the end the rate stays"
    assert past[0] <= seen[plan.total_steps - 1] + 1e-15, "and is not above the last one"
    if plan.name not in ("constant", "inverse_sqrt", "chapter", "hf_cosine"):
        assert past[0] == pytest.approx(min(seen[plan.total_steps - 1], plan.floor_ratio))


FALLING = ("warmup_cosine", "wsd", "linear", "constant", "inverse_sqrt", "polynomial", "hf_cosine")


@given(plans(names=FALLING, lawful=True))
@settings(max_examples=100)
def test_after_the_warmup_it_never_rises(plan):
    assert all(a >= b - 1e-15 for a, b in pairwise(factors(plan, 5)[plan.warmup_steps :]))


@given(plans(names=("warmup_cosine", "wsd", "linear", "polynomial"), lawful=True))
@settings(max_examples=100)
def test_the_last_used_step_is_on_the_floor(plan):
    if plan.warmup_steps < plan.total_steps - 1:
        assert plan.factor(plan.total_steps - 1) == pytest.approx(plan.floor_ratio, abs=1e-15)


@given(plans(names=("cosine_restarts",), lawful=True))
@settings(max_examples=100)
def test_restarts_are_equal_to_a_step_and_go_from_peak_to_floor(plan):
    bounds = plan.cycle_bounds()
    assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
    rest = plan.total_steps - plan.warmup_steps
    assert len(bounds) == min(plan.cycles, rest)
    lengths = [end - start for start, end in bounds]
    assert sum(lengths) == rest
    assert not lengths or max(lengths) - min(lengths) <= 1
    for start, end in bounds:
        assert plan.factor(start) == pytest.approx(1, abs=1e-15)
        if end - start > 1:
            assert plan.factor(end - 1) == pytest.approx(plan.floor_ratio, abs=1e-15)
            falls = pairwise(plan.factor(step) for step in range(start, end))
            assert all(a >= b for a, b in falls)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"name": "polynomial", "power": 1.0}, {"name": "linear"}),
        ({"name": "wsd", "decay_steps": 30, "decay_shape": "linear"}, {"name": "linear"}),
        ({"name": "wsd", "decay_steps": 25, "decay_shape": "linear"}, {"name": "linear"}),
        ({"name": "cosine_restarts", "cycles": 1}, {"name": "warmup_cosine"}),
        ({"name": "chapter", "cosine_steps": 24}, {"name": "warmup_cosine"}),
    ],
)
def test_shapes_that_coincide(one, same):
    numbers = {"total_steps": 30, "warmup_steps": 5, "start_factor": 0.1, "floor_ratio": 0.1}
    assert factors(Plan(**numbers, **one)) == pytest.approx(factors(Plan(**numbers, **same)))


def test_the_sqrt_tail_is_below_the_linear_one_within():
    sqrt, line = (
        Plan("wsd", 50, 5, 0.1, 0.0, decay_steps=20, decay_shape=s) for s in ("sqrt", "linear")
    )
    assert all(sqrt.factor(step) < line.factor(step) for step in range(30, 49))
    assert sqrt.factor(29) == line.factor(29) == 1


def test_the_closed_form_keeps_its_digits_near_a_floor_of_zero():
    plan = Plan("warmup_cosine", 1_000_001, 0, 1.0, 0.0)
    exact = (math.pi / 2 / 1_000_000) ** 2  # sin^2 of a small angle
    assert plan.factor(999_999) == pytest.approx(exact, rel=1e-9)


def test_a_step_before_the_first_is_a_bug():
    with pytest.raises(ValueError, match="step -1"):
        Plan("constant", 5, 0, 1.0, 1.0).factor(-1)


# Impossible and doubtful plans -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"total_steps": 0}, "max_steps: 0"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
        ({"start_factor": 0.0}, "start_factor"),
        ({"start_factor": 1.5}, "start_factor: 1.5"),
        ({"floor_ratio": -0.1}, "min_lr"),
        ({"floor_ratio": math.nan}, "min_lr"),
        ({"decay_steps": 0}, "decay_steps: 0"),
        ({"power": 0.0}, "power"),
        ({"cycles": 0}, "cycles: 0"),
        ({"cosine_steps": 0}, "cosine_steps"),
    ],
)
def test_impossible_numbers_are_refused(change, word):
    numbers = {"total_steps": 10, "warmup_steps": 2, "start_factor": 0.1, "floor_ratio": 0.1}
    with pytest.raises(UserError, match=word):
        Plan(name="warmup_cosine", **(numbers | change))


def test_a_warmup_longer_than_the_run_is_cut_off():
    plan = Plan("warmup_cosine", 4, 8, 0.2, 0.1)
    assert factors(plan) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.1, 0.1])
    assert plan.phases() == [("warmup", 0, 4)]


def test_a_floor_above_the_peak_is_risen_to():
    assert factors(Plan("linear", 3, 0, 1.0, 2.0)) == [1.0, 1.5, 2.0, 2.0, 2.0]


# From a config ---------------------------------------------------------------------------------


def config_of(**schedule: object) -> Config:
    lr = schedule.pop("lr", 1e-3)
    return Config.model_validate({"optimizer": {"lr": lr}, "schedule": schedule})


def test_from_config():
    config = config_of(lr=2e-3, warmup_fraction=0.05, min_lr=5e-4, start_factor=0.2)
    assert Plan.from_config(config, 200) == Plan("warmup_cosine", 200, 10, 0.2, 0.25)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "warmup_cosine"}, {"floor_ratio": 0.1}),
        ({"name": "cosine_restarts"}, {"floor_ratio": 0.1, "cycles": 4}),
        ({"name": "cosine_restarts", "cycles": 7}, {"floor_ratio": 0.1, "cycles": 7}),
        ({"name": "linear"}, {"floor_ratio": 0.0}),
        ({"name": "constant"}, {"floor_ratio": 0.0}),
        ({"name": "inverse_sqrt", "min_lr": 1e-4}, {"floor_ratio": 0.1}),
        ({"name": "polynomial", "power": 2}, {"floor_ratio": 0.0, "power": 2.0}),
        ({"name": "hf_cosine"}, {"floor_ratio": 0.0}),
        ({"name": "wsd"}, {"floor_ratio": 0.0, "decay_steps": 1000, "decay_shape": "sqrt"}),
        (
            {"name": "wsd", "decay_steps": 50, "decay_shape": "linear"},
            {"floor_ratio": 0.0, "decay_steps": 50, "decay_shape": "linear"},
        ),
        ({"name": "wsd", "decay_fraction": 0.5}, {"floor_ratio": 0.0, "decay_steps": 2500}),
        (
            {"name": "chapter"},
            {"warmup_steps": 1000, "floor_ratio": 0.01, "floor_rate": 1e-5, "cosine_steps": None},
        ),
        (
            {"name": "chapter", "cosine_steps": 4000, "min_lr": 2e-5, "warmup_steps": 9},
            {"warmup_steps": 9, "floor_ratio": 0.02, "floor_rate": 2e-5, "cosine_steps": 4000},
        ),
    ],
)
def test_each_shape_from_its_knobs(schedule, expected):
    wanted = {"total_steps": 5000, "warmup_steps": 100, "start_factor": 0.1} | expected
    plan = Plan.from_config(config_of(**schedule), 5000)
    assert plan == Plan(name=schedule["name"], **(wanted | {"floor_ratio": plan.floor_ratio}))
    assert plan.floor_ratio == pytest.approx(expected["floor_ratio"])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"warmup_steps": 300}, ["warmup of 300", "run of 200"]),
        ({"name": "chapter"}, ["warmup of 1000", "run of 200"]),
        ({"min_lr": 2e-3}, ["0.002", "above the peak lr 0.001"]),
        ({"name": "wsd", "warmup_steps": 150, "decay_steps": 51}, ["150", "51", "run of 200"]),
        ({"name": "wsd", "warmup_fraction": 0.9}, ["warmup of 180", "tail of 40"]),
        ({"name": "cosine_restarts", "cycles": 99}, ["99 cosines", "196 steps", "at most 98"]),
        ({"name": "cosine_restarts", "warmup_steps": 199}, ["4 cosines", "1 steps", "at most 1"]),
        ({"name": "hf_cosine", "min_lr": 1e-4}, ["hf_cosine ends at 0"]),
    ],
)
def test_what_cannot_be_meant_is_refused_and_can_be_looked_at(schedule, words):
    config = config_of(**schedule)
    with pytest.raises(UserError) as error:
        Plan.from_config(config, 200)
    for word in words:
        assert word in str(error.value)
    plan = Plan.from_config(config, 200, strict=False)
    assert len(factors(plan)) == 202
    assert sum(end - start for _, start, end in plan.phases()) == 200


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"name": "cosine_restarts", "warmup_steps": 192}, 200),
        ({"name": "cosine_restarts", "warmup_steps": 200}, 200),
        ({"name": "cosine_restarts", "cycles": 1}, 1),
        ({"name": "wsd", "warmup_steps": 150, "decay_steps": 50}, 200),
        ({"name": "wsd"}, 1),
        ({"name": "chapter", "warmup_steps": 200, "cosine_steps": 1}, 200),
        ({"min_lr": 1e-3}, 200),
    ],
)
def test_what_just_fits_is_taken(schedule, steps):
    assert not list(schedule_problems(config_of(**schedule), steps))


@pytest.mark.parametrize("warmup", [0.02, 0.1, 0.25, 0.5, 0.98])
def test_fractions_that_fill_the_run_fit_at_every_length(warmup):
    """Each is rounded, and both rounded up must not be a step too many: 0.98 + 0.02 of 75."""
    config = config_of(name="wsd", warmup_fraction=warmup, decay_fraction=1 - warmup)
    for steps in range(1, 200):
        if config.warmup_steps(steps) < steps:  # a tail has at least one step
            assert not list(schedule_problems(config, steps))
            assert config.warmup_steps(steps) + config.decay_steps(steps) >= steps - 1


def test_a_floor_above_the_peak_is_found_whatever_the_length_is_given_in():
    for train in ({"max_steps": 10}, {"max_epochs": 1}):
        config = Config.model_validate({"schedule": {"min_lr": 1.0}, "train": train})
        assert [found.lint for found in contradictions(config)] == ["floor_above_peak"]


# Phases and other lengths ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan("warmup_cosine", 10, 3, 0.1, 0.1), [("warmup", 0, 3), ("decay", 3, 10)]),
        (Plan("linear", 10, 0, 0.1, 0.1), [("decay", 0, 10)]),
        (Plan("constant", 10, 10, 0.1, 0.1), [("warmup", 0, 10)]),
        (Plan("constant", 10, 4, 0.1, 0.1), [("warmup", 0, 4), ("stable", 4, 10)]),
        (
            Plan("wsd", 10, 2, 0.1, 0.0, decay_steps=3),
            [("warmup", 0, 2), ("stable", 2, 7), ("decay", 7, 10)],
        ),
        (Plan("wsd", 10, 2, 0.1, 0.0, decay_steps=9), [("warmup", 0, 2), ("decay", 2, 10)]),
        (
            Plan("cosine_restarts", 10, 3, 0.1, 0.1, cycles=2),
            [("warmup", 0, 3), ("cycle 1", 3, 6), ("cycle 2", 6, 10)],
        ),
        (Plan("chapter", 10, 3, 0.1, 0.1), [("warmup", 0, 3), ("decay", 3, 10)]),
        (
            Plan("chapter", 10, 3, 0.1, 0.1, cosine_steps=4),
            [("warmup", 0, 3), ("decay", 3, 8), ("overrun", 8, 10)],
        ),
    ],
)
def test_phases(plan, expected):
    assert plan.phases() == expected


@given(plans())
@settings(max_examples=100)
def test_phases_cover_the_run_without_gaps(plan):
    phases = plan.phases()
    assert phases[0][1] == 0
    assert phases[-1][2] == plan.total_steps
    assert all(before[2] == after[1] for before, after in pairwise(phases))
    for name, start, end in phases:
        assert start < end
        inside = [plan.factor(step) for step in range(start, end)]
        if name == "stable":
            assert inside == [1.0] * len(inside)
        if (
            name == "decay"
            and plan.name == "wsd"
            and start > plan.warmup_steps
            and plan.floor_ratio < 1
        ):
            assert inside[0] < 1


@given(plans(), st.integers(1, 300))
@settings(max_examples=100)
def test_scaled_keeps_the_phases(plan, steps):
    other = plan.scaled(steps)
    assert other.total_steps == steps
    assert (other.name, other.floor_ratio, other.cycles) == (
        plan.name,
        plan.floor_ratio,
        plan.cycles,
    )
    names = [name for name, *_ in plan.phases() if name != "overrun"]
    if plan.name == "cosine_restarts":
        names = names[: len(other.phases())]
    if steps >= 3:
        assert [name for name, *_ in other.phases()][: len(names)] == names


def test_scaled_in_proportion():
    plan = Plan("wsd", 1000, 20, 0.1, 0.0, decay_steps=300)
    assert plan.scaled(100) == Plan("wsd", 100, 2, 0.1, 0.0, decay_steps=30)
    assert Plan("wsd", 1000, 20, 0.1, 0.0).scaled(100).decay_steps == 20
    chapter = Plan("chapter", 100_000, 1000, 0.1, 0.03, floor_rate=1e-5)
    short = Plan("chapter", 1000, 10, 0.1, 0.03, cosine_steps=1000, floor_rate=1e-5)
    assert chapter.scaled(1000) == short
    assert Plan("linear", 10, 10, 0.1, 0.0).scaled(7).warmup_steps == 7


# A schedule that begins anew ---------------------------------------------------------------------


@given(plans(40), st.integers(1, 60))
@settings(max_examples=100)
def test_an_origin_moves_everything_along(plan, origin):
    moved = replace(plan, total_steps=plan.total_steps + origin, origin=origin)
    assert (moved.steps, moved.rebased) == (plan.total_steps, plan)
    assert plan.rebased is plan
    for step in range(plan.total_steps + 2):
        assert moved.rate(origin + step, 3e-4) == plan.rate(step, 3e-4)
    assert moved.phases() == [(n, a + origin, b + origin) for n, a, b in plan.phases()]
    assert moved.warmup_end == plan.warmup_steps + origin
    assert moved.tail_start == plan.tail_start + origin
    assert moved.t_max == plan.t_max
    assert moved.scaled(33) == plan.scaled(33)
    if plan.name == "cosine_restarts":
        bounds = [(a + origin, b + origin) for a, b in plan.cycle_bounds()]
        assert moved.cycle_bounds() == bounds


def test_steps_before_the_origin_are_another_plans():
    with pytest.raises(ValueError, match="step 9 is before the first, which is 10"):
        Plan("linear", 20, 2, 0.1, 0.0, origin=10).factor(9)


def test_a_schedule_that_begins_anew_has_what_is_left():
    """Shares are shares of what is left; lengths in steps stay."""
    config = config_of(name="wsd", warmup_fraction=0.05, decay_fraction=0.5, restart_step=800)
    plan = Plan.from_config(config, 1000)
    assert plan == Plan("wsd", 1000, 10, 0.1, 0.0, decay_steps=100, origin=800)
    assert plan.phases() == [("warmup", 800, 810), ("stable", 810, 900), ("decay", 900, 1000)]
    plan = Plan.from_config(config_of(warmup_steps=20, restart_step=800), 1000)
    assert plan == Plan("warmup_cosine", 1000, 20, 0.1, 0.1, origin=800)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"restart_step": 200}, ["begin anew at step 200 of a run of 200", "train longer"]),
        ({"restart_step": 190, "warmup_steps": 11}, ["11 steps", "the 10 steps from 190 on"]),
        (
            {"name": "wsd", "restart_step": 190, "warmup_steps": 5, "decay_steps": 6},
            ["a tail of 6", "the 10 steps from 190 on"],
        ),
        (
            {"name": "cosine_restarts", "restart_step": 193, "warmup_steps": 0},
            ["4 cosines", "the 7 steps after", "at most 3"],
        ),
    ],
)
def test_a_restart_that_does_not_fit_is_refused(schedule, words):
    config = config_of(**schedule)
    with pytest.raises(UserError) as error:
        Plan.from_config(config, 200)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("origin", [-1, 20, 21])
def test_an_origin_lies_within_the_run(origin):
    with pytest.raises(UserError, match="restart_step"):
        Plan("linear", 20, 2, 0.1, 0.0, origin=origin)
