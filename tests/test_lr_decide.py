"""From losses to a rate: the arithmetic of the finder, on curves whose answer is known."""

import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.lr.decide import (
    HORIZON_SPREAD,
    Minimum,
    Posterior,
    horizon_power,
    minimum,
)


def valley(octave: float, bottom: float, *, left: float = 0.15, right: float = 0.15) -> float:
    """A loss with a parabola's minimum of 2.0 at `bottom`, each side with its own curvature."""
    distance = octave - bottom
    return 2.0 + (right if distance > 0 else left) * distance**2


@given(st.floats(-9, -5), st.floats(-0.49, 0.49))
def test_the_middle_of_a_symmetric_valley_is_its_minimum(centre: float, offset: float) -> None:
    grid = [centre + step for step in range(-3, 4)]
    found = minimum({o: [valley(o, centre + offset)] for o in grid})
    assert found.inside
    assert found.octave == pytest.approx(centre + offset, abs=0.15)


def test_a_flat_bottom_gives_its_middle_not_its_luckiest_point() -> None:
    losses = {-8.0: 2.5, -7.0: 2.001, -6.0: 2.002, -5.0: 2.0, -4.0: 2.5}
    assert minimum({o: [loss] for o, loss in losses.items()}).octave == pytest.approx(-6, abs=0.2)


def test_a_wall_on_one_side_does_not_push_the_answer() -> None:
    gentle = minimum({o: [valley(o, -6)] for o in (-8.0, -7.0, -6.0, -5.0, -4.0)})
    wall = minimum({-8.0: [2.6], -7.0: [2.15], -6.0: [2.0], -5.0: [2.15], -4.0: [math.inf]})
    assert wall.octave == pytest.approx(gentle.octave, abs=0.05)
    assert math.isfinite(wall.octave)


def test_a_minimum_at_an_end_is_not_inside() -> None:
    falling = {o: [3.0 + o / 10] for o in (-8.0, -7.0, -6.0)}
    found = minimum(falling)
    assert not found.inside
    assert found.at_bottom
    rising = minimum({o: [3.0 - o / 10] for o in (-8.0, -7.0, -6.0)})
    assert not rising.inside
    assert not rising.at_bottom


def test_an_end_that_is_level_says_where_the_valley_is_a_slope_does_not() -> None:
    level = minimum({-8.0: [3.0], -7.0: [2.6], -6.0: [2.51], -5.0: [2.5]})
    assert level.usable
    assert not level.inside
    slope = minimum({-8.0: [3.0], -7.0: [2.8], -6.0: [2.6], -5.0: [2.4]})
    assert not slope.usable


def test_where_everything_diverged_nothing_is_inside() -> None:
    assert not minimum({o: [math.inf] for o in (-3.0, -2.0, -1.0)}).usable


def test_the_interval_of_seeds_that_agree_is_narrow_and_of_others_wide() -> None:
    grid = [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0]
    agree = minimum({o: [valley(o, -6), valley(o, -6), valley(o, -6)] for o in grid})
    differ = minimum({o: [valley(o, -7.5), valley(o, -6), valley(o, -4.5)] for o in grid})
    assert agree.high - agree.low < 0.01
    assert differ.high - differ.low > 1
    assert differ.low <= differ.octave <= differ.high


def at(octave: float, *, inside: bool = True) -> Minimum:
    return Minimum(octave, octave, octave, inside)


def test_one_round_is_carried_to_the_whole_run_by_the_known_power() -> None:
    posterior = Posterior(0.45)
    posterior.add(16, at(-4), seeds=1)
    assert posterior.octave(16) == pytest.approx(-4)
    assert posterior.octave(16 * 2**5) == pytest.approx(-4 - 0.45 * 5)
    assert posterior.power == pytest.approx(0.45)
    # The doubt grows with the distance, by that of the power.
    grown = posterior.doubt(16 * 2**5) ** 2 - posterior.doubt(16) ** 2
    assert math.sqrt(grown) == pytest.approx(1.28 * HORIZON_SPREAD * 5)


def test_rounds_that_agree_with_each_other_correct_the_power() -> None:
    posterior = Posterior(0.45)
    for steps in (16, 64, 256, 1024):
        posterior.add(steps, at(-2 - 0.2 * math.log2(steps)), seeds=3)
    assert 0.2 < posterior.power < 0.3
    one = Posterior(0.45)
    one.add(1024, at(-4), seeds=3)
    assert posterior.doubt(8192) < one.doubt(8192)


def test_an_edge_counts_for_little() -> None:
    posterior = Posterior(0.45)
    posterior.add(64, at(-4), seeds=2)
    posterior.add(64, at(-8, inside=False), seeds=2)
    assert posterior.octave(64) > -4.5


def test_more_seeds_mean_less_doubt() -> None:
    doubts = []
    for seeds in (1, 2, 3):
        posterior = Posterior(0.45)
        posterior.add(64, at(-4), seeds)
        doubts.append(posterior.doubt(64))
    assert doubts == sorted(doubts, reverse=True)
    assert doubts[0] > 1.3 * doubts[2]


def test_the_interval_holds_what_it_says_on_simulated_searches() -> None:
    """Where noise and power are as assumed, the true rate is inside four times in five."""
    rng = random.Random(3)
    held = 0
    for _ in range(400):
        power = rng.gauss(0.45, HORIZON_SPREAD)
        posterior = Posterior(0.45)
        for steps in (16, 64):
            posterior.add(steps, at(rng.gauss(-power * math.log2(steps), 0.4)), seeds=1)
        truth = -power * math.log2(1024)
        held += abs(posterior.octave(1024) - truth) <= posterior.doubt(1024)
    assert 0.74 < held / 400 < 0.86


def test_powers_are_those_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "lr-find.md").read_text(encoding="utf-8")
    told = page.partition("The finder takes p = ")[2].partition(" give or take")[0]
    powers = {
        horizon_power("adamw", qk_norm=True),
        horizon_power("sgd", qk_norm=False),
        horizon_power("muon", qk_norm=True),
        horizon_power("adafactor", qk_norm=True),
    }
    assert {float(number) for number in re.findall(r"0\.\d+", told)} == powers
