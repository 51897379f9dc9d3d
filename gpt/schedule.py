"""The rate at each step: torch's schedulers in sequence, and the closed form that checks them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from gpt.config import Config, ScheduleName, schedule_problems
from gpt.errors import UserError


# Measured: torch's chained updates drift from the closed form by 3e-12 in 6e5 steps.
TOLERANCE = 1e-11
MAX_WALK = 200_000
_FOREVER = 2**62


@dataclass(frozen=True)
class Plan:
    """A whole schedule in numbers; rates are shares of each parameter group's own peak.

    Step 0 is the first update. The warmup rises in a line from `start_factor` to the peak, which
    step `warmup_steps` uses; warmup_cosine then falls to `floor_ratio`, which the last step uses.
    Steps past the end keep the last rate, or the floor where that is lower.
    """

    name: ScheduleName
    total_steps: int
    warmup_steps: int
    start_factor: float
    floor_ratio: float

    def __post_init__(self) -> None:
        """Raises UserError for numbers that no schedule can have."""
        problems = []
        if self.total_steps < 1:
            problems.append(f"train.max_steps: {self.total_steps} is below 1; give at least one")
        elif not 0 <= self.warmup_steps <= self.total_steps:
            problems.append(
                f"schedule.warmup_steps: {self.warmup_steps} is not within the run's 0 to "
                f"{self.total_steps} steps; 1-5 % of them is usual"
            )
        if not 0 < self.start_factor <= 1:
            problems.append(
                f"schedule.start_factor: {self.start_factor} is not above 0 and at most 1; "
                "0.1 is usual"
            )
        if not 0 <= self.floor_ratio <= 1:
            problems.append(
                f"schedule.min_lr: {self.floor_ratio:g} x lr is not between 0 and lr; lower it"
            )
        if problems:
            raise UserError(*problems)

    @classmethod
    def from_config(cls, config: Config, total_steps: int) -> "Plan":
        """The plan of a run of `total_steps`; raises UserError if the warmup does not fit."""
        problems = [
            f"{found.keys[0]}: {found.message}" for found in schedule_problems(config, total_steps)
        ]
        if problems:
            raise UserError(*problems)
        return cls(
            name=config.schedule.name,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps(total_steps),
            start_factor=config.schedule.start_factor,
            floor_ratio=config.min_lr / config.optimizer.lr,
        )

    @property
    def decay_steps(self) -> int:
        """Steps from the peak down to the floor; at least 1, so that it can be divided by."""
        return max(1, self.total_steps - self.warmup_steps - 1)

    @property
    def end_factor(self) -> float:
        """The share of the peak that steps past the end use."""
        last = self.factor(self.total_steps - 1)
        return last if self.name == "constant" else min(last, self.floor_ratio)

    def factor(self, step: int) -> float:
        """The share of the peak that a step uses, from 0 to 1."""
        if step < 0:
            raise ValueError(f"step {step} is before the first, which is 0")
        if step >= self.total_steps:
            return self.end_factor
        if step < self.warmup_steps:
            return self.start_factor + (1 - self.start_factor) * step / self.warmup_steps
        if self.name == "constant":
            return 1.0
        # Source: Loshchilov & Hutter 2017, eq. 5, as a squared sine of what is left, which keeps
        # its digits near the floor: (1 + cos x) / 2 = sin^2((pi - x) / 2).
        left = (self.decay_steps - (step - self.warmup_steps)) / self.decay_steps
        return self.floor_ratio + (1 - self.floor_ratio) * math.sin(math.pi / 2 * left) ** 2

    def rate(self, step: int, peak: float) -> float:
        """The rate that a step uses in a group whose peak is `peak`: the closed form."""
        return peak * self.factor(step)


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


def build_scheduler(optimizer: Optimizer, plan: Plan) -> LRScheduler:
    """The schedule on an optimizer whose groups have their peak as `lr`: warmup, shape, end.

    Call `step()` after each optimizer step that was not skipped. To resume, first build, then load
    the optimizer, then `load_scheduler`: in another order torch's schedulers go wrong.
    """
    phases: list[LRScheduler] = []
    milestones: list[int] = []
    if plan.warmup_steps > 0:
        phases.append(
            LinearLR(optimizer, start_factor=plan.start_factor, total_iters=plan.warmup_steps)
        )
        milestones.append(plan.warmup_steps)
    if plan.warmup_steps < plan.total_steps:
        if plan.name == "constant":
            phases.append(ConstantLR(optimizer, factor=1.0, total_iters=_FOREVER))
        else:
            phases.append(ProportionalCosine(optimizer, plan.decay_steps, plan.floor_ratio))
        milestones.append(plan.total_steps)
    # torch's cosine rises again past its end, so the end is a phase of its own.
    phases.append(ConstantLR(optimizer, factor=plan.end_factor, total_iters=_FOREVER))
    return SequentialLR(optimizer, phases, milestones)


def load_scheduler(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Loads a saved state into a freshly built scheduler of the same plan and peaks.

    torch would take over the saved length, floor and peaks without a word; here a difference
    raises UserError.
    """
    old, new = _constants(state), _constants(scheduler.state_dict())
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        raise UserError(
            *(
                f"schedule: {key} was {old.get(key)} in the checkpoint and is {new.get(key)} now; "
                "resume with the run's own config, or start a new run"
                for key in changed
            )
        )
    scheduler.load_state_dict(state)


def _constants(state: dict[str, Any]) -> dict[str, Any]:
    """What a schedule's state holds that never changes in a run, by a readable name."""
    fixed = ("start_factor", "total_iters", "T_max", "floor_ratio", "factor", "base_lrs")
    found: dict[str, Any] = {"milestones": list(state["_milestones"])}
    for index, phase in enumerate(state["_schedulers"]):
        found |= {f"phase {index} {key}": phase[key] for key in fixed if key in phase}
    return found


def walk(plan: Plan, peaks: Sequence[float], steps: int | None = None) -> list[tuple[float, ...]]:
    """The rates that torch's scheduler gives, for each step a tuple with one rate a group.

    Runs the real scheduler over an optimizer without gradients for `steps` (default: all of the
    plan's; it takes about 10 microseconds a step), and asserts that it keeps to the closed form.
    """
    groups = [{"params": [torch.zeros((), requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_scheduler(optimizer, plan)
    optimizer.step()  # torch warns if the schedule moves before the first update
    rates: list[tuple[float, ...]] = []
    for step in range(plan.total_steps if steps is None else steps):
        factor = plan.factor(step)
        now = tuple(float(group["lr"]) for group in optimizer.param_groups)
        for rate, peak in zip(now, peaks, strict=True):
            assert abs(rate - factor * peak) <= TOLERANCE * peak, (plan, step, rate, peak)
        rates.append(now)
        scheduler.step()
    return rates


def check_plan(plan: Plan, peaks: Sequence[float]) -> None:
    """Walks the whole schedule, and a little past its end, before the first step is taken.

    A plan of more than MAX_WALK steps is walked shrunk in proportion, all its phases kept.
    """
    shrink = max(1.0, plan.total_steps / MAX_WALK)
    total_steps = round(plan.total_steps / shrink)
    warmup_steps = min(total_steps, math.ceil(plan.warmup_steps / shrink))
    short = replace(plan, total_steps=total_steps, warmup_steps=warmup_steps)
    walk(short, peaks, total_steps + 10)
