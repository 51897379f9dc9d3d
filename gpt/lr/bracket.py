"""Reading a ramp: where the loss falls, where it is lowest, where it breaks away.

A ramp trains while the rate rises geometrically. Arithmetic only, no training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The loss has broken away when it is this share of its whole fall above its lowest.
BROKEN_SHARE = 0.25
BROKEN_SIGMAS = 5
# A fall smaller than this many deviations of the noise is none.
_FALL_SIGMAS = 4


@dataclass(frozen=True)
class Bracket:
    """What a ramp shows: rates in order of size.

    `steepest` is where the loss falls fastest, `lowest` where it is lowest, `broken` where it has
    broken away (None: it had not when the ramp ended).
    """

    steepest: float
    lowest: float
    broken: float | None

    @property
    def low(self) -> float:
        """The least rate worth a trial."""
        return min(self.steepest, self.lowest) / 3

    @property
    def high(self) -> float:
        """The largest rate worth a trial."""
        return self.lowest if self.broken is None else self.broken / 2


def read_ramp(rates: Sequence[float], losses: Sequence[float]) -> Bracket | None:
    """The bracket of one ramp; None if the loss never fell by more than its noise.

    Losses are smoothed with a window that is centred in log rate, since a one-sided average lags
    and puts everything at too high a rate.
    """
    if len(losses) < 5:
        return None
    smooth = centred(losses, max(1, len(losses) // 32))
    noise = _noise(losses)
    index = min(range(len(smooth)), key=smooth.__getitem__)
    start = sum(losses[: max(2, len(losses) // 10)]) / max(2, len(losses) // 10)
    fall = start - smooth[index]
    if index == 0 or fall <= max(_FALL_SIGMAS * noise / math.sqrt(3), 1e-3):
        return None
    slopes = [smooth[i + 1] - smooth[i] for i in range(index)]
    steepest = min(range(len(slopes)), key=slopes.__getitem__)
    limit = smooth[index] + max(BROKEN_SIGMAS * noise, BROKEN_SHARE * fall)
    broken = next((rates[i] for i in range(index, len(losses)) if losses[i] > limit), None)
    between = math.sqrt(rates[steepest] * rates[steepest + 1])
    return Bracket(between, rates[index], broken)


def centred(values: Sequence[float], half: int) -> list[float]:
    """A moving average of up to `2 * half + 1` values that looks as far back as ahead."""
    averages = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        averages.append(sum(window) / len(window))
    return averages


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of the losses' noise, from second differences in the flat first half."""
    half = list(losses[: max(5, len(losses) // 2)])
    bends = [a - 2 * b + c for a, b, c in zip(half, half[1:], half[2:], strict=False)]
    return math.sqrt(sum(bend * bend for bend in bends) / len(bends) / 6)
