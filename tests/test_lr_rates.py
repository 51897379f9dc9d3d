"""A config at another rate: what moves along, what stays, what cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import Config, contradictions
from gpt.errors import UserError
from gpt.lr.rates import rate_options, rate_text, with_lr
from tests.conftest import ConfigMaker


def test_every_rate_keeps_its_ratio_and_nothing_else_moves(make_config: ConfigMaker) -> None:
    config = make_config(
        optimizer__name="muon",
        optimizer__lr="1e-2",
        optimizer__adamw_lr="3e-3",
        optimizer__lr_batch_size="64",
        schedule__min_lr="1e-3",
        model__preset="cpu-1m",
    )
    moved = with_lr(config, 3e-2)
    assert moved.optimizer.lr == 3e-2
    assert moved.optimizer.adamw_lr == 9e-3
    assert moved.schedule.min_lr == 3e-3
    assert moved.optimizer.lr_batch_size is None, "the new rate was not chosen at that batch"
    back = with_lr(moved, 1e-2).model_dump()
    expected = config.model_dump()
    expected["optimizer"]["lr_batch_size"] = None
    assert back == expected
    assert config.optimizer.lr == 1e-2, "the config itself is not changed"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer__name": "muon", "optimizer__adamw_lr": "3e-3", "schedule__min_lr": "9.99e-3"},
        {"optimizer__lr_batch_size": "64", "schedule__min_lr": "0"},
        {"schedule__name": "chapter", "train__max_steps": "2000"},
    ],
)
@pytest.mark.parametrize("lr", [3.1e-3, 1e-2 / 3, 0.0299996, 1e-6])
def test_what_to_type_makes_the_same_config(
    changes: dict[str, str], lr: float, make_config: ConfigMaker
) -> None:
    """A rate alone would leave the others as they are, and a floor above it is refused."""
    config = make_config(optimizer__lr="1e-2", **changes)
    words = rate_options(config, lr)
    typed = {
        key.removeprefix("--").replace(".", "__"): value
        for key, value in zip(words[::2], words[1::2], strict=True)
    }
    found, expected = make_config(**(changes | typed)), with_lr(config, lr)
    assert found.optimizer.lr_batch_size is None
    assert found.optimizer.lr == pytest.approx(expected.optimizer.lr, rel=5e-2)
    assert found.min_lr == pytest.approx(expected.min_lr, rel=5e-2)
    if expected.optimizer.adamw_lr is not None:
        ratio = expected.optimizer.adamw_lr / expected.optimizer.lr
        assert found.optimizer.adamw_lr == pytest.approx(ratio * found.optimizer.lr, rel=5e-3)


def test_floors_that_are_not_given_follow_by_their_own_rule(make_config: ConfigMaker) -> None:
    moved = with_lr(make_config(optimizer__lr="1e-2"), 1e-3)
    assert moved.schedule.min_lr is None
    assert moved.min_lr == pytest.approx(1e-4)


def test_the_chapters_floor_is_absolute_but_never_above_the_peak(make_config: ConfigMaker) -> None:
    default = make_config(optimizer__lr="3e-4", schedule__name="chapter", train__max_steps="2000")
    assert with_lr(default, 3e-3).min_lr == 1e-5
    assert with_lr(default, 1e-6).min_lr == 1e-6
    given_floor = make_config(
        optimizer__lr="3e-4",
        schedule__name="chapter",
        schedule__min_lr="2e-5",
        train__max_steps="2000",
    )
    assert with_lr(given_floor, 3e-3).schedule.min_lr == 2e-5


def test_a_floor_at_the_peak_stays_there(make_config: ConfigMaker) -> None:
    config = make_config(optimizer__lr="3e-4", schedule__min_lr="3e-4")
    for lr in (1e-4, 7e-4, 1 / 3):
        assert with_lr(config, lr).schedule.min_lr == pytest.approx(lr)


def test_rates_that_no_config_holds(make_config: ConfigMaker) -> None:
    with pytest.raises(UserError, match=r"lr 2000: optimizer\.lr would be 2000"):
        with_lr(make_config(), 2000.0)
    config = make_config(optimizer__name="muon", optimizer__lr="1e-2", optimizer__adamw_lr="1")
    with pytest.raises(UserError, match=r"lr 100: optimizer\.adamw_lr would be 10000"):
        with_lr(config, 100.0)


@given(lr=st.floats(1e-12, 1e3), share=st.floats(0, 1), new=st.floats(1e-12, 1e3))
def test_no_rate_makes_a_contradiction(lr: float, share: float, new: float) -> None:
    config = Config.model_validate({"optimizer": {"lr": lr}, "schedule": {"min_lr": share * lr}})
    moved = with_lr(config, new)
    assert not list(contradictions(moved))
    assert moved.min_lr / new == pytest.approx(share, rel=1e-9, abs=1e-300)


@given(st.floats(1e-300, 1e3))
def test_the_text_of_a_rate_is_exact(lr: float) -> None:
    assert float(rate_text(lr)) == lr


def test_the_text_of_a_rate_is_short() -> None:
    assert [rate_text(lr) for lr in (3e-4, 1e-3, 0.00125, 1000.0)] == [
        "3.0e-04",
        "1.0e-03",
        "1.25e-03",
        "1.0e+03",
    ]
