"""Reading a ramp, on curves whose knee is known."""

import itertools
import math
import random

import pytest

from gpt.lr.bracket import Bracket, centred, read_ramp


def ramp(
    steps: int = 200, knee: float = 1e-2, wall: float = 1e-1, noise: float = 0.01, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Flat at ln 65, falling around `knee`, up again past `wall`; rates from 1e-6 to 1."""
    rng = random.Random(seed)
    rates = [10 ** (-6 + 6 * i / (steps - 1)) for i in range(steps)]
    losses = []
    for rate in rates:
        fall = 1.5 / (1 + (knee / rate) ** 1.5)
        rise = 2.0 * max(0.0, math.log10(rate / wall))
        losses.append(4.17 - fall + rise + rng.gauss(0, noise))
    return rates, losses


@pytest.mark.parametrize("steps", [16, 32, 64, 250])
@pytest.mark.parametrize("knee", [1e-4, 1e-3, 1e-2])
def test_the_landmarks_are_near_the_truth(steps: int, knee: float) -> None:
    bracket = read_ramp(*ramp(steps, knee, wall=20 * knee))
    assert bracket is not None
    assert knee / 4 < bracket.steepest < knee * 4
    assert knee < bracket.lowest < knee * 80
    assert bracket.broken is not None
    assert bracket.lowest < bracket.broken
    assert bracket.low < bracket.steepest < bracket.high < bracket.broken


def test_smoothing_does_not_shift_the_curve() -> None:
    """A one-sided average would put the steepest point of a clean curve too high."""
    rates, losses = ramp(250, 1e-3, wall=1.0, noise=0.0)
    bracket = read_ramp(rates, losses)
    assert bracket is not None
    slopes = [b - a for a, b in itertools.pairwise(losses)]
    clean = rates[min(range(len(slopes)), key=slopes.__getitem__)]
    assert 0.85 < bracket.steepest / clean < 1.2


def test_noise_alone_is_no_fall() -> None:
    rng = random.Random(1)
    rates = [10 ** (-6 + i / 10) for i in range(60)]
    assert read_ramp(rates, [4.17 + rng.gauss(0, 0.02) for _ in rates]) is None


def test_a_flat_line_and_a_rising_one_are_no_fall() -> None:
    rates = [10 ** (-6 + i / 10) for i in range(60)]
    assert read_ramp(rates, [4.17] * 60) is None
    assert read_ramp(rates, [4.17 + i / 10 for i in range(60)]) is None
    assert read_ramp(rates[:3], [4.0, 3.0, 2.0]) is None


def test_a_ramp_that_never_breaks_says_so() -> None:
    rates, losses = ramp(64, 1e-2, wall=1e9)
    bracket = read_ramp(rates, losses)
    assert bracket is not None
    assert bracket.broken is None
    assert bracket.high == bracket.lowest


def test_the_bracket_runs_from_a_third_to_a_half() -> None:
    bracket = Bracket(steepest=3e-3, lowest=1e-2, broken=4e-2)
    assert bracket.low == pytest.approx(1e-3)
    assert bracket.high == pytest.approx(2e-2)


def test_a_centred_average_keeps_lines_and_ends() -> None:
    line = [float(i) for i in range(20)]
    assert centred(line, 4) == pytest.approx(line)
    assert centred([1, 1, 4, 1, 1], 1) == pytest.approx([1, 2, 2, 2, 1])
