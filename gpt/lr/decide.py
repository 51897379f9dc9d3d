"""From losses of short trainings to one rate with an interval: arithmetic only, no training.

Rates are handled as octaves: log2 of the rate, so that a factor is a distance.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# The best rate falls as the run gets longer: lr* ~ steps ** -power, at a fixed batch. Bjorck et al.
# 2024 (arXiv:2409.19913) fit 0.32 over token horizons of large models. From very short runs of
# small ones it falls faster, and faster still without the normalised q and k that make a high rate
# bearable; muon's falls less, adafactor's more. Measured: docs/lr-find.md.
_POWER_WITH_QK_NORM, _POWER_WITHOUT = 0.45, 0.50
_POWER_OF = {"muon": 0.25, "adafactor": 0.65}
# How far that power was from run to run.
HORIZON_SPREAD = 0.1
# How far one seed's lowest point lies from the true one, in octaves; measured there too.
OCTAVE_NOISE = 0.4
# The same where the lowest rate is the last one that was tried.
END_NOISE = 0.8
BOOTSTRAPS = 400
# Losses this share apart are told apart badly by short runs.
TOLERANCE = 0.01
_PARTS = 20
_INTERVAL = (0.1, 0.9)

Losses = Mapping[float, Sequence[float]]


@dataclass(frozen=True)
class Minimum:
    """The lowest point of a curve of loss over octaves, and where resampling puts it."""

    octave: float
    low: float
    high: float
    inside: bool
    at_bottom: bool = False
    level: bool = False

    @property
    def usable(self) -> bool:
        """Whether it says where the valley is: bracketed, or level where the trials end."""
        return self.inside or self.level


def minimum(losses: Losses) -> Minimum:
    """Where the curve is lowest: `losses` holds the losses of each octave, one a seed, in order.

    A diverged training counts as infinite. `inside` says that the lowest rate tried is not at an
    end of what was tried, `at_bottom` that it is the smallest tried, `level` that it is at an end
    but hardly lower than its neighbour. The interval (10 % to 90 %) comes from resampling seeds.
    """
    octaves = sorted(losses)
    means = [_mean(losses[octave]) for octave in octaves]
    best = _lowest(octaves, means)
    index = means.index(min(means))
    inside = 0 < index < len(octaves) - 1
    seeds = min(len(losses[octave]) for octave in octaves)
    spots = [best]
    if seeds > 1:
        rng = random.Random(0)
        for _ in range(BOOTSTRAPS):
            chosen = [rng.randrange(seeds) for _ in range(seeds)]
            spots.append(_lowest(octaves, [_mean([losses[o][s] for s in chosen]) for o in octaves]))
        spots.sort()
    low, high = (spots[round(share * (len(spots) - 1))] for share in _INTERVAL)
    neighbour = means[1 if index == 0 else index - 1]
    level = not inside and neighbour <= (1 + TOLERANCE) * means[index] < math.inf
    return Minimum(best, min(low, best), max(high, best), inside, index == 0, level)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _lowest(octaves: Sequence[float], means: Sequence[float]) -> float:
    """The middle of the valley: the mean octave, where a loss `TOLERANCE` higher weighs 1/e.

    A vertex would jump about where the valley is flat, which it often is.
    """
    floor = min(means)
    if not math.isfinite(floor):
        return octaves[0]
    scale = TOLERANCE * floor
    # Beyond this height the weight is nothing; a wall would only bend the line between two rates.
    heights = [min((mean - floor) / scale, 8.0) for mean in means]
    total = moment = 0.0
    for place, (left, right) in enumerate(pairwise(octaves)):
        for part in range(_PARTS):
            share = (part + 0.5) / _PARTS
            height = heights[place] * (1 - share) + heights[place + 1] * share
            weight = math.exp(-height) * (right - left)
            total += weight
            moment += weight * (left + share * (right - left))
    return moment / total if total else octaves[0]


def horizon_power(optimizer: str, qk_norm: bool) -> float:
    """How fast the best rate falls with the length of the run: lr* ~ steps ** -power."""
    return _POWER_OF.get(optimizer, _POWER_WITH_QK_NORM if qk_norm else _POWER_WITHOUT)


class Posterior:
    """The best rate against the length of the run, from what rounds of trials saw.

    A line in logarithms, octave = a - power * log2(steps): its power is known beforehand about as
    well as it was measured (`horizon_power`, `HORIZON_SPREAD`), its height is not.
    """

    def __init__(self, power: float) -> None:
        """Takes the power to expect; knows nothing of the height yet."""
        self._power = power
        self._seen: list[tuple[float, float, float]] = []

    def add(self, steps: int, lowest: Minimum, seeds: int) -> None:
        """Takes in where runs of `steps` were lowest."""
        spread = OCTAVE_NOISE / math.sqrt(seeds)
        if not lowest.inside:
            spread = END_NOISE
        self._seen.append((math.log2(steps), lowest.octave, 1 / spread**2))

    def octave(self, steps: float) -> float:
        """The best rate for a run of `steps`, as log2."""
        x, y, power, _, _ = self._line()
        return y - power * (math.log2(steps) - x)

    @property
    def power(self) -> float:
        """How fast the best rate falls with the steps, from what was known and what was seen."""
        return self._line()[2]

    def doubt(self, steps: float) -> float:
        """Octaves to either side of it that hold the best rate four times in five."""
        x, _, _, height_variance, power_variance = self._line()
        length = math.log2(steps) - x
        return 1.28 * math.sqrt(height_variance + power_variance * length**2)

    def _line(self) -> tuple[float, float, float, float, float]:
        """Centre, height there, power, and the variances of the last two, by least squares."""
        weight = sum(w for _, _, w in self._seen)
        x = sum(w * x for x, _, w in self._seen) / weight
        y = sum(w * y for _, y, w in self._seen) / weight
        prior = 1 / HORIZON_SPREAD**2
        spread = sum(w * (xi - x) ** 2 for xi, _, w in self._seen)
        tilt = sum(w * (xi - x) * (yi - y) for xi, yi, w in self._seen)
        power = (prior * self._power - tilt) / (prior + spread)
        return x, y, power, 1 / weight, 1 / (prior + spread)
