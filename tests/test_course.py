"""A rate in stretches: which plan a step belongs to, phases cut where a plan ends, the highest."""

import pytest

from gpt.course import Course, RateJump, Stretch
from gpt.plan import Plan
from gpt.ratepolicy import RateChange

LINE = Plan("linear", 11, 1, 0.5, 0.0)
ANEW = Plan("wsd", 20, 2, 0.5, 0.0, decay_steps=4, decay_shape="linear", origin=6)
COURSE = Course(
    (
        Stretch(0, LINE, {"matrices": 1.0, "rest": 0.1}),
        Stretch(6, ANEW, {"matrices": 4.0, "rest": 0.1}),
    )
)


def test_each_step_has_its_plan() -> None:
    assert COURSE.total_steps == 20
    assert COURSE.peaks("matrices") == (1.0, 4.0)
    for step in range(22):
        plan, peak = (LINE, 1.0) if step < 6 else (ANEW, 4.0)
        assert COURSE.rate(step, "matrices") == plan.rate(step, peak)
    assert [end for _, end in COURSE.bounded()] == [6, 20]


def test_phases_are_cut_where_a_plan_ends() -> None:
    assert COURSE.phases() == [
        ("warmup", 0, 1),
        ("decay", 1, 6),
        ("warmup", 6, 8),
        ("stable", 8, 16),
        ("decay", 16, 20),
    ]
    later = Course((Stretch(0, LINE, {"all": 1.0}), Stretch(9, Plan("linear", 12, 9, 0.1, 0), {})))
    assert later.phases() == [("warmup", 0, 1), ("decay", 1, 9), ("decay", 9, 12)]


def test_the_highest_step_is_the_first_of_them() -> None:
    assert COURSE.highest("matrices") == 8
    assert COURSE.highest("rest") == 1
    for name in ("constant", "cosine_restarts", "inverse_sqrt", "chapter"):
        plan = Plan(name, 40, 3, 0.1, 0.1, cycles=3, cosine_steps=9)
        for first in (1, 5, 17):
            course = Course((Stretch(0, LINE, {"all": 1e-3}), Stretch(first, plan, {"all": 1.0})))
            rates = [course.rate(step, "all") for step in range(40)]
            assert rates[course.highest("all")] == max(rates)


def test_a_jump_in_words_and_in_numbers() -> None:
    change = RateChange(policy="rewarm", step=6, changed={"schedule.restart_step": (None, 6)})
    before, after = ({"rest": 0.1, "matrices": 0.5}, {"matrices": 0.25, "rest": 0.1})
    jump = RateJump(change, before, after)
    assert jump.line() == (
        "policy   rewarm from step 6 on: 1.00e-01 before, 1.00e-01 after (rest), "
        "5.00e-01 before, 2.50e-01 after (matrices); schedule.restart_step null → 6"
    )
    values = jump.values()
    assert (values["lr_before"], values["lr_after"]) == (0.5, 0.25)
    assert values["changed"] == {"schedule.restart_step": [None, 6]}
    same = RateJump(change, {"matrices": 0.5, "rest": 0.5}, {"matrices": 0.1, "rest": 0.1})
    assert "on: 5.00e-01 before, 1.00e-01 after; " in same.line()
    unknown = RateJump(change, None, None)
    assert "open until the text is tokenized" in unknown.line()
    assert unknown.values()["lr_before"] is None


def test_a_step_before_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="before the first"):
        Course((Stretch(0, ANEW, {"all": 1.0}),)).rate(3, "all")
