"""Steps that are better not taken: a loss or a gradient far outside of what came before."""

import math

import numpy as np

from gpt.checkpoint import Progress

WINDOW = 128
LEAST = 32  # steps that must be known before one can stand out


class SpikeGuard:
    """The sigma rule over the last WINDOW steps that were taken; its memory is in the Progress.

    Source: OLMo et al. 2024 (arXiv:2501.00656), skipping steps whose loss or gradient norm is more
    than six standard deviations above the mean of the last 128. Deviations: the norm is
    judged by its logarithm, since healthy norms are skewed; what was skipped does not count for
    what comes after; after `limit` skips in a row the next step is taken though it stands out, and
    its level for the new one: nothing is judged until LEAST steps of that are known.
    """

    def __init__(self, sigmas: float, limit: int, progress: Progress) -> None:
        """Takes how many standard deviations are too many, and how many skips in a row."""
        self._sigmas, self._limit, self._progress = sigmas, limit, progress

    def outlier(self, loss: float, grad_norm: float) -> str:
        """What of a step stands out, in words; empty if nothing, or if it has to be taken."""
        return "" if self._must_take() else self._judge(loss, grad_norm)

    def _must_take(self) -> bool:
        return self._progress.skips_in_row >= self._limit

    def _judge(self, loss: float, grad_norm: float) -> str:
        found = _above("loss", loss, self._progress.guard_losses, self._sigmas)
        norms = self._progress.guard_norms
        if not found and grad_norm > 0 and all(norm > 0 for norm in norms):
            logs = [math.log(norm) for norm in norms]
            found = _above("log of the gradient norm", math.log(grad_norm), logs, self._sigmas)
        return found

    def took(self, loss: float, grad_norm: float) -> None:
        """Remembers a step that was taken."""
        progress = self._progress
        if math.isfinite(loss) and math.isfinite(grad_norm):
            # What was skipped may also have been not finite, which tells of no new level.
            if self._must_take() and self._judge(loss, grad_norm):
                progress.guard_losses, progress.guard_norms = [], []
            progress.guard_losses = [*progress.guard_losses, loss][-WINDOW:]
            progress.guard_norms = [*progress.guard_norms, grad_norm][-WINDOW:]


def _above(name: str, value: float, known: list[float], sigmas: float) -> str:
    """How far a value stands above those known, in words; empty if not that far."""
    if len(known) < LEAST:
        return ""
    # numpy: the library's own `stdev`, of exact fractions, takes half a millisecond.
    mean, deviation = float(np.mean(known)), float(np.std(known, ddof=1))
    # Below a thousandth, differences are rounding.
    if value <= mean + sigmas * max(deviation, 1e-3 * max(1.0, abs(mean))):
        return ""
    above = (value - mean) / deviation if deviation > 0 else math.inf
    return f"{name} {value:.4g}, {above:.1f} sigma above {mean:.4g}"
