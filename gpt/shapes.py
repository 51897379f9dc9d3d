"""What torch's schedulers lack for this project's schedules: floors as shares, and other curves.

The curves are for `LambdaLR`: each gives the share of the peak at a step counted from its own
start. Their fields are plain numbers, which `LambdaLR` saves with its state. `schedule` puts them
together; it does not use them in its closed form, which checks them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR


class ProportionalCosine(CosineAnnealingLR):
    """torch's cosine with the floor as a share of each group's own peak.

    torch's `eta_min` is one rate for all groups, and a group whose peak is below it would rise.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, floor_ratio: float) -> None:  # noqa: N803
        """Takes torch's `T_max` in steps, and the floor as a share of the peak."""
        self.floor_ratio = floor_ratio
        super().__init__(optimizer, T_max)

    def get_lr(self) -> list[Any]:
        """The rate of each group by torch's recursion."""
        return self._each_with_its_floor(super().get_lr)

    def _get_closed_form_lr(self) -> list[Any]:
        return self._each_with_its_floor(super()._get_closed_form_lr)

    def _each_with_its_floor(self, rates: Callable[[], list[Any]]) -> list[Any]:
        by_peak = {}
        for peak in {float(peak) for peak in self.base_lrs}:
            self.eta_min = self.floor_ratio * peak
            by_peak[peak] = rates()
        return [by_peak[float(peak)][index] for index, peak in enumerate(self.base_lrs)]


@dataclass
class Hold:
    """Stays at a share of the peak; `ConstantLR` has one for all groups, and none above 1."""

    held_factor: float

    def __call__(self, step: int) -> float:
        """The share of the peak."""
        return self.held_factor


@dataclass
class RiseFromZero:
    """A warmup whose step 0 has the rate 0, which `LinearLR` refuses."""

    warmup_steps: int

    def __call__(self, step: int) -> float:
        """The share of the peak."""
        return step / self.warmup_steps


@dataclass
class HalfCosine:
    """Half a cosine that is at the floor one step past its last.

    Source: transformers, `get_cosine_schedule_with_warmup`; the same operations in the same order,
    so that the rates are equal to the last bit.
    """

    half_period_steps: int
    floor_ratio: float

    def __call__(self, step: int) -> float:
        """The share of the peak."""
        height = 0.5 * (1.0 + math.cos(math.pi * (step / self.half_period_steps)))
        return height * (1 - self.floor_ratio) + self.floor_ratio


@dataclass
class PowerFall:
    """Falls as a power of what is left; `PolynomialLR` has no floor."""

    fall_steps: int
    power: float
    floor_ratio: float

    def __call__(self, step: int) -> float:
        """The share of the peak."""
        height = math.pow(1.0 - step / self.fall_steps, self.power)
        return self.floor_ratio + (1.0 - self.floor_ratio) * height


@dataclass
class SqrtFall:
    """Falls as 1 - sqrt(x), x the share of the fall that is done: steep first, then ever less.

    Source: Hägele et al. 2024 (arXiv:2405.18392), the 1-sqrt cooldown.
    """

    fall_steps: int
    floor_ratio: float

    def __call__(self, step: int) -> float:
        """The share of the peak."""
        return 1.0 - (1.0 - self.floor_ratio) * math.sqrt(step / self.fall_steps)


@dataclass
class InverseSqrt:
    """Falls as 1 / sqrt(step of the run) from the end of the warmup, and never below the floor.

    Source: Vaswani et al. 2017, eq. 3, as a share of the peak.
    """

    warmup_steps: int
    floor_ratio: float

    def __call__(self, step: int) -> float:
        """The share of the peak; `step` is counted from the end of the warmup."""
        anchor = max(1, self.warmup_steps)
        factor = math.sqrt(anchor) / math.sqrt(max(anchor, self.warmup_steps + step))
        return max(self.floor_ratio, factor)
