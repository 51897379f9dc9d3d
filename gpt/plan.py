"""A schedule in plain numbers: the rate of each step in closed form, and its phases. No torch."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from gpt.config import Config, ScheduleName, schedule_problems
from gpt.errors import UserError


@dataclass(frozen=True)
class Plan:
    """A whole schedule in numbers; rates are shares of each parameter group's own peak.

    Step 0 is the first update. The warmup rises in a line from `start_factor` to the peak, which
    step `warmup_steps` uses; then the shape falls to `floor_ratio`, which the last step uses.
    Steps past the end keep the last rate, or the floor where that is lower.

    A schedule that begins anew in the middle of a run has an `origin`: all its lengths count from
    there, and the steps before it are another plan's.

    A plan is arithmetic only: a warmup longer than the run is cut off at its end, and a floor above
    the peak is risen to. `from_config` refuses such plans unless it is told not to.

    Attributes:
        name: the shape after the warmup.
        total_steps: steps of the whole run.
        warmup_steps: steps below the peak at the start.
        start_factor: share of the peak that step 0 uses; hf_cosine starts at 0 instead.
        floor_ratio: share of the peak that the shape falls to. constant does not fall, hf_cosine
            is there one step past the end, inverse_sqrt only goes no lower.
        decay_steps: wsd: steps of the tail, at most all that follow the warmup; None: a fifth of
            the run.
        decay_shape: wsd: how the tail falls.
        power: polynomial: exponent of what is left of the run.
        cycles: cosine_restarts: cosines of equal length, as far as the steps divide.
        cosine_steps: chapter: steps from the peak to the floor; None: as many as the run has.
        floor_rate: chapter: the floor as one rate for every group, in place of `floor_ratio`; a
            group whose peak is below it rises.
        origin: the step of the run that is the schedule's first.
    """

    name: ScheduleName
    total_steps: int
    warmup_steps: int
    start_factor: float
    floor_ratio: float
    decay_steps: int | None = None
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    power: float = 1.0
    cycles: int = 4
    cosine_steps: int | None = None
    floor_rate: float | None = None
    origin: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for numbers that no schedule can have."""
        tail, cosine, floor = self.decay_steps, self.cosine_steps, self.floor_ratio
        checks = [
            ("train.max_steps", self.total_steps, self.total_steps >= 1, "at least 1"),
            (
                "schedule.restart_step",
                self.origin,
                self.origin == 0 or 0 < self.origin < self.total_steps,
                f"null, or before the end of the run, {self.total_steps}",
            ),
            ("schedule.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            ("schedule.start_factor", self.start_factor, 0 < self.start_factor <= 1, "in (0, 1]"),
            ("schedule.min_lr / lr", floor, 0 <= floor < math.inf, "0 or more"),
            ("schedule.decay_steps", tail, tail is None or tail >= 1, "at least 1"),
            ("schedule.power", self.power, 0 < self.power < math.inf, "above 0; 1 is a line"),
            ("schedule.cycles", self.cycles, self.cycles >= 1, "at least 1"),
            ("schedule.cosine_steps", cosine, cosine is None or cosine >= 1, "at least 1"),
        ]
        problems = [
            f"{key}: {value} is out of range; it must be {needed}"
            for key, value, fine, needed in checks
            if not fine
        ]
        if problems:
            raise UserError(*problems)

    @classmethod
    def from_config(cls, config: Config, total_steps: int, *, strict: bool = True) -> "Plan":
        """The plan of a run of `total_steps`.

        Raises UserError for what cannot be meant (a warmup longer than the run, a floor above the
        peak); with `strict=False` such a plan is made too, to be looked at.
        """
        problems = [
            f"{found.keys[0]}: {found.message}" for found in schedule_problems(config, total_steps)
        ]
        if problems and strict:
            raise UserError(*problems)
        schedule = config.schedule
        return cls(
            name=schedule.name,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps(total_steps),
            start_factor=schedule.start_factor,
            floor_ratio=config.min_lr / config.optimizer.lr,
            decay_steps=config.decay_steps(total_steps) if schedule.name == "wsd" else None,
            decay_shape=schedule.decay_shape,
            power=schedule.power,
            cycles=schedule.cycles,
            cosine_steps=schedule.cosine_steps,
            floor_rate=config.min_lr if schedule.name == "chapter" else None,
            origin=schedule.restart_step or 0,
        )

    @property
    def steps(self) -> int:
        """Steps that the schedule has: all of the run, or those from its origin on."""
        return self.total_steps - self.origin

    @cached_property
    def rebased(self) -> "Plan":
        """The same schedule with its own first step as step 0."""
        return replace(self, total_steps=self.steps, origin=0) if self.origin else self

    def rate(self, step: int, peak: float) -> float:
        """The rate that a step uses in a group whose peak is `peak`: the closed form."""
        return peak * self.factor(step, peak)

    def factor(self, step: int, peak: float | None = None) -> float:
        """The share of its peak that a step uses in a group.

        The group's `peak` matters only where the chapter's `floor_rate` is given; without it the
        share is that of a group whose floor is `floor_ratio`.
        """
        if step < self.origin:
            raise ValueError(f"step {step} is before the first, which is {self.origin}")
        if self.origin:
            return self.rebased.factor(step - self.origin, peak)
        floor = self.floor_ratio
        if self.name == "chapter" and self.floor_rate is not None and peak is not None:
            floor = self.floor_rate / peak
        if step < self.total_steps:
            return self._factor_within(step, floor)
        last = self._factor_within(self.total_steps - 1, floor)
        # The others would have come to their floor.
        return last if self.name in ("constant", "inverse_sqrt", "chapter") else min(last, floor)

    def _factor_within(self, step: int, floor: float) -> float:
        if step < self.warmup_steps:
            first = 0.0 if self.name == "hf_cosine" else self.start_factor
            return first + (1 - first) * step / self.warmup_steps
        if self.name == "constant":
            return 1.0
        if self.name == "inverse_sqrt":
            # Source: Vaswani et al. 2017, eq. 3, as a share of the peak.
            anchor = max(1, self.warmup_steps)
            return max(floor, math.sqrt(anchor / max(step, anchor)))
        top, bottom = self._descent(step)
        if step < top:
            return 1.0
        length = max(1, bottom - top)
        return floor + (1 - floor) * self._height((length - (step - top)) / length)

    def _descent(self, step: int) -> tuple[int, int]:
        """The last step at the peak and the first one at the floor, of the fall around a step."""
        top, last = self.warmup_steps, self.total_steps - 1
        match self.name:
            case "wsd":
                return max(top, self.tail_start - 1), last
            case "hf_cosine":
                return top, self.total_steps
            case "chapter":
                return top, top + self.t_max
            case "cosine_restarts":
                start, end = self._cycle(step)
                return start, end - 1
        return top, last

    def _height(self, left: float) -> float:
        """How high over its floor a shape is, 1 to 0, with `left` of its fall still to come."""
        match self.name:
            case "linear":
                return left
            case "polynomial":
                return math.pow(left, self.power)
            case "wsd":
                # Source: Hägele et al. 2024 (arXiv:2405.18392), the 1-sqrt cooldown.
                return left if self.decay_shape == "linear" else 1 - math.sqrt(1 - left)
        # Source: Loshchilov & Hutter 2017, eq. 5, as a squared sine of what is left, which keeps
        # its digits near the floor: (1 + cos x) / 2 = sin^2((pi - x) / 2).
        return math.sin(math.pi / 2 * left) ** 2

    @property
    def warmup_end(self) -> int:
        """The step that is the first at the peak, where the run gets there."""
        return self.origin + self.warmup_steps

    @property
    def tail_start(self) -> int:
        """wsd: the first step of the tail, which is the first below the peak."""
        tail = max(1, round(self.steps / 5)) if self.decay_steps is None else self.decay_steps
        return self.origin + max(self.warmup_steps, self.steps - tail)

    @property
    def t_max(self) -> int:
        """chapter: the cosine's `T_max`."""
        return self.steps if self.cosine_steps is None else self.cosine_steps

    def _cycle(self, step: int) -> tuple[int, int]:
        """cosine_restarts: the first step and the end of the cosine that a step is in."""
        rest = self.total_steps - self.warmup_steps
        index = ((step - self.warmup_steps + 1) * self.cycles - 1) // rest
        start, end = (self.warmup_steps + cut * rest // self.cycles for cut in (index, index + 1))
        return start, end

    def cycle_bounds(self) -> list[tuple[int, int]]:
        """cosine_restarts: the first step and the end of each cosine, in order."""
        if self.origin:
            shifted = self.rebased.cycle_bounds()
            return [(first + self.origin, end + self.origin) for first, end in shifted]
        bounds, step = [], self.warmup_steps
        while step < self.total_steps:
            bounds.append(self._cycle(step))
            step = bounds[-1][1]
        return bounds

    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first step and end (exclusive) of each part of the run that has any steps.

        The names are warmup, stable, decay, `cycle 1` and so on; overrun is where the chapter's
        cosine has passed its floor and rises again.
        """
        start, end = self.warmup_end, self.total_steps
        match self.name:
            case "constant":
                parts = [("stable", start, end)]
            case "wsd":
                parts = [("stable", start, self.tail_start), ("decay", self.tail_start, end)]
            case "cosine_restarts":
                parts = [
                    (f"cycle {number}", *bounds)
                    for number, bounds in enumerate(self.cycle_bounds(), start=1)
                ]
            case "chapter":
                rise = start + self.t_max + 1
                parts = [("decay", start, rise), ("overrun", rise, end)]
            case _:
                parts = [("decay", start, end)]
        cut = [
            (name, first, min(last, end))
            for name, first, last in [("warmup", self.origin, start), *parts]
        ]
        return [(name, first, last) for name, first, last in cut if first < last]

    def scaled(self, total_steps: int) -> "Plan":
        """The same schedule over another number of steps, every length in proportion, from step 0.

        A warmup, a plateau or a fall that had a step keeps one, as far as `total_steps` allows.
        """
        if self.origin:
            return self.rebased.scaled(total_steps)
        old_steps = self.total_steps
        warmup = math.ceil(self.warmup_steps * total_steps / old_steps)
        if self.warmup_steps < old_steps:
            warmup = min(warmup, total_steps - 1)
        plan = replace(self, total_steps=total_steps, warmup_steps=warmup)
        if self.name == "wsd":
            tail = round((old_steps - self.tail_start) * total_steps / old_steps)
            if self.tail_start > self.warmup_steps:
                tail = min(tail, total_steps - warmup - 1)
            return replace(plan, decay_steps=max(1, tail))
        if self.name == "chapter":
            return replace(plan, cosine_steps=max(1, round(self.t_max * total_steps / old_steps)))
        return plan
