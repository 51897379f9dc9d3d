"""How other finders read one ramp, as published: fastai, pytorch-lr-finder, Lightning.

Written from their documentation, to compare with: none of them is used by `gpt-lr find`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

# Their own defaults: a ramp of 100 steps, fastai's and Lightning's averages with 0.98.
STEPS = 100
BETA = 0.98


def averaged(losses: Sequence[float], beta: float = BETA, *, corrected: bool = True) -> np.ndarray:
    """The one-sided exponential average, with or without the correction of its start."""
    average, out = 0.0 if corrected else losses[0], []
    for count, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        out.append(average / (1 - beta**count) if corrected else average)
    return np.array(out)


def fastai_valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Half way down the longest decreasing subsequence of the averaged losses."""
    smooth = averaged(losses)
    longest = [1] * len(smooth)
    for i in range(1, len(smooth)):
        longest[i] = 1 + max((longest[j] for j in range(i) if smooth[j] > smooth[i]), default=0)
    end = int(np.argmax(longest))
    third = longest[end] / 3
    return rates[max(0, end - longest[end]) + int(third) + int(third / 2)]


def fastai_steep(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where the averaged loss falls fastest against the logarithm of the rate."""
    slopes = np.diff(averaged(losses)) / np.diff(np.log(rates))
    return rates[int(np.argmin(slopes))]


def fastai_minimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate of the lowest averaged loss."""
    return rates[int(np.argmin(averaged(losses)))] / 10


def pytorch_lr_finder(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The steepest point between two steps, after an average of 0.05 without correction."""
    smooth = averaged(losses, 1 - 0.05, corrected=False)[10:-5]
    return rates[10 + int(np.argmin(np.gradient(smooth)))]


def lightning(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The steepest point against the rate itself, though the ramp is geometric."""
    smooth = averaged(losses)[10:-1]
    slopes = np.gradient(smooth, np.array(rates[10:-1]))
    return rates[10 + int(np.argmin(slopes))]


RULES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "fastai valley": fastai_valley,
    "fastai steep": fastai_steep,
    "fastai minimum/10": fastai_minimum,
    "pytorch-lr-finder": pytorch_lr_finder,
    "Lightning": lightning,
}


def stopped(rates: Sequence[float], losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """The ramp up to where all of them stop: the averaged loss is four times its lowest."""
    best = math.inf
    for index, value in enumerate(averaged(losses)):
        best = min(best, value)
        if value > 4 * best:
            return list(rates[:index]), list(losses[:index])
    return list(rates), list(losses)
