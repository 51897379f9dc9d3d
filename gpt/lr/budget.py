"""What a search for the rate may cost."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.data import TokenData

_TIMED_STEPS = 4


@dataclass(frozen=True)
class Budget:
    """A share of the training run, or seconds; one of the two."""

    share: float | None = None
    seconds: float | None = None

    def steps(self, config: "Config", data: "TokenData") -> float:
        """The budget in training steps. For seconds, a few steps are timed first."""
        total = config.total_steps(data.train.n_tokens)
        if self.share is not None:
            return self.share * total
        assert self.seconds is not None
        from gpt.lr.trial import Laboratory

        laboratory = Laboratory(config, data)
        started = time.perf_counter()
        laboratory.ramp(1e-7, 1e-7, 2, config.run.seed)  # the first steps are slower
        middle = time.perf_counter()
        laboratory.ramp(1e-7, 1e-7, _TIMED_STEPS, config.run.seed)
        now = time.perf_counter()
        return max(0.0, self.seconds - (now - started)) / ((now - middle) / _TIMED_STEPS)


def parse_budget(text: str) -> Budget:
    """`15%` or `0.15` as a share of the run, `90s` or `5min` as a time."""
    words = text.strip().lower()
    for suffix, factor in (("%", 0.01), ("min", 60.0), ("s", 1.0), ("", 1.0)):
        if not words.endswith(suffix):
            continue
        try:
            value = float(words.removesuffix(suffix)) * factor
        except ValueError:
            break
        if not 0 < value < math.inf:
            break
        return Budget(seconds=value) if suffix in ("s", "min") else Budget(share=value)
    raise UserError(
        f"--budget: {text!r} is neither a share of the run above 0 (0.15, 15%) nor a time "
        "(90s, 5min)"
    )
