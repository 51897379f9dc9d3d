"""The rate at each step: torch's schedulers in sequence, and the closed form that checks them."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from gpt.eager_optim import SGD
from gpt.errors import UserError
from gpt.plan import Plan as Plan  # the schedule's two halves are imported from one place
from gpt.shapes import (
    HalfCosine,
    Hold,
    InverseSqrt,
    PowerFall,
    ProportionalCosine,
    RiseFromZero,
    SqrtFall,
)

# Measured: torch's chained updates drift from the closed form by 3e-12 in 6e5 steps, and in
# proportion to the steps: by 1e-11 in 3e6.
TOLERANCE = 1e-11
_TOLERANCE_STEPS = 600_000
MAX_WALK = 200_000
_FOREVER = 2**62


def build_scheduler(optimizer: Optimizer, plan: Plan) -> LRScheduler:
    """The schedule on an optimizer whose groups have their peak as `lr`: warmup, shape, end.

    Its clock begins with the plan: at 0 where the plan has its origin.

    Call `step()` after each optimizer step that was not skipped. To resume, first build, then load
    the optimizer, then `load_scheduler`: in another order torch's schedulers go wrong.
    """
    plan = plan.rebased
    peaks = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    phases: list[tuple[int, LRScheduler]] = []
    if plan.warmup_steps > 0:
        phases.append((0, _warmup(optimizer, plan)))
    if plan.warmup_steps < plan.total_steps:
        phases += _shape(optimizer, plan)
    # torch's cosine rises again past its end, so the end is a phase of its own.
    end = _hold(optimizer, [plan.factor(plan.total_steps, float(peak)) for peak in peaks])
    phases.append((plan.total_steps, end))
    return SequentialLR(
        optimizer, [phase for _, phase in phases], [start for start, _ in phases[1:]]
    )


def _warmup(optimizer: Optimizer, plan: Plan) -> LRScheduler:
    if plan.name == "hf_cosine":
        return LambdaLR(optimizer, RiseFromZero(plan.warmup_steps))
    return LinearLR(optimizer, start_factor=plan.start_factor, total_iters=plan.warmup_steps)


def _hold(optimizer: Optimizer, factors: list[float]) -> LRScheduler:
    """Stays at a share of the peak, one for each group."""
    if len(set(factors)) == 1 and factors[0] <= 1:
        return ConstantLR(optimizer, factor=factors[0], total_iters=_FOREVER)
    return LambdaLR(optimizer, [Hold(factor) for factor in factors])


def _shape(optimizer: Optimizer, plan: Plan) -> list[tuple[int, LRScheduler]]:
    """What follows the warmup: each phase with the step that it begins at."""
    top, last, floor = plan.warmup_steps, plan.total_steps - 1, plan.floor_ratio
    length = max(1, last - top)
    fall: LRScheduler
    match plan.name:
        case "constant":
            fall = _hold(optimizer, [1.0])
        case "warmup_cosine":
            fall = ProportionalCosine(optimizer, length, floor)
        case "linear" | "polynomial":
            power = plan.power if plan.name == "polynomial" else 1.0
            fall = _power_fall(optimizer, length, power, floor)
        case "inverse_sqrt":
            fall = LambdaLR(optimizer, InverseSqrt(top, floor))
        case "hf_cosine":
            fall = LambdaLR(optimizer, HalfCosine(plan.total_steps - top, floor))
        case "chapter" if plan.floor_rate is not None:
            fall = CosineAnnealingLR(optimizer, T_max=plan.t_max, eta_min=plan.floor_rate)
        case "chapter":
            fall = ProportionalCosine(optimizer, plan.t_max, floor)
        case "cosine_restarts":
            return [
                (start, ProportionalCosine(optimizer, max(1, end - start - 1), floor))
                for start, end in plan.cycle_bounds()
            ]
        case "wsd":
            return _stable_and_tail(optimizer, plan)
    return [(top, fall)]


def _stable_and_tail(optimizer: Optimizer, plan: Plan) -> list[tuple[int, LRScheduler]]:
    top, floor = max(plan.warmup_steps, plan.tail_start - 1), plan.floor_ratio
    length = max(1, plan.total_steps - 1 - top)
    tail = (
        _power_fall(optimizer, length, 1.0, floor)
        if plan.decay_shape == "linear"
        else LambdaLR(optimizer, SqrtFall(length, floor))
    )
    stable = [(plan.warmup_steps, _hold(optimizer, [1.0]))] if top > plan.warmup_steps else []
    return [*stable, (top, tail)]


def _power_fall(optimizer: Optimizer, length: int, power: float, floor: float) -> LRScheduler:
    """A line where torch has it: its `LinearLR` refuses to end above the peak."""
    if power == 1 and floor <= 1:
        return LinearLR(optimizer, start_factor=1.0, end_factor=floor, total_iters=length)
    return LambdaLR(optimizer, PowerFall(length, power, floor))


def load_scheduler(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Loads a saved state into a freshly built scheduler of the same plan and peaks.

    torch would take over the saved lengths, floors and peaks without a word; here a difference
    raises UserError.
    """
    old, new = _constants(state), _constants(scheduler.state_dict())
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        raise UserError(
            *(
                f"schedule: {key} was {old.get(key, 'absent')} in the checkpoint and is "
                f"{new.get(key, 'absent')} now; "
                "resume with the run's own config, or start a new run"
                for key in changed
            )
        )
    scheduler.load_state_dict(state)


_FIXED = ("start_factor", "end_factor", "total_iters", "T_max", "floor_ratio", "factor", "base_lrs")


def _constants(state: dict[str, Any]) -> dict[str, Any]:
    """What a schedule's state holds that never changes in a run, by a readable name."""
    found: dict[str, Any] = {"milestones": list(state["_milestones"])}
    for index, phase in enumerate(state["_schedulers"]):
        found |= {f"phase {index} {key}": phase[key] for key in _FIXED if key in phase}
        if "eta_min" in phase and "floor_ratio" not in phase:  # else it is the last group's
            found[f"phase {index} eta_min"] = phase["eta_min"]
        curves = phase.get("lr_lambdas", [])
        for key in curves[0] if curves else []:
            by_group = [curve.get(key) for curve in curves]
            same = by_group.count(by_group[0]) == len(by_group)
            found[f"phase {index} {key}"] = by_group[0] if same else by_group
    return found


def advance_scheduler(optimizer: Optimizer, scheduler: LRScheduler, plan: Plan, step: int) -> None:
    """Puts a freshly built scheduler where it would be at `step` had it run from the plan's start.

    Bit for bit: a scheduler of the same plan is stepped there (10 microseconds a step) and its
    state loaded. The optimizer's groups get the rates of that step.
    """
    peaks = [float(group["initial_lr"]) for group in optimizer.param_groups]
    ahead, its_scheduler = _weightless(plan, peaks)
    for _ in range(step - plan.origin):
        its_scheduler.step()
    load_scheduler(scheduler, its_scheduler.state_dict())
    for group, other, peak in zip(optimizer.param_groups, ahead.param_groups, peaks, strict=True):
        rate = float(other["lr"])
        assert abs(rate - plan.rate(step, peak)) <= tolerance(plan, peak), (plan, step, rate)
        group["lr"] = rate


def walk(plan: Plan, peaks: Sequence[float], steps: int | None = None) -> list[tuple[float, ...]]:
    """The rates that torch's scheduler gives from the plan's first step on, one a group each time.

    Runs the real scheduler over an optimizer without gradients for `steps` (default: all of the
    plan's; it takes about 10 microseconds a step), and asserts that it keeps to the closed form.
    """
    optimizer, scheduler = _weightless(plan, peaks)
    allowed = [(peak, tolerance(plan, peak)) for peak in peaks]
    rates: list[tuple[float, ...]] = []
    for step in range(plan.origin, plan.origin + (plan.steps if steps is None else steps)):
        now = tuple(float(group["lr"]) for group in optimizer.param_groups)
        for rate, (peak, slack) in zip(now, allowed, strict=True):
            assert abs(rate - plan.rate(step, peak)) <= slack, (plan, step, rate)
        rates.append(now)
        scheduler.step()
    return rates


def _weightless(plan: Plan, peaks: Sequence[float]) -> tuple[Optimizer, LRScheduler]:
    """The plan's scheduler over an optimizer that has groups, and nothing to train."""
    groups = [{"params": [torch.zeros((), requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = SGD(groups)
    scheduler = build_scheduler(optimizer, plan)
    optimizer.step()  # torch warns if the schedule moves before the first update
    return optimizer, scheduler


def tolerance(plan: Plan, peak: float) -> float:
    """How far torch's rate may be from the closed form in a group, as a rate.

    Where the chapter's cosine has passed its floor, torch goes on from a difference of two nearly
    equal rates, and its error grows with T_max squared; measured: 8.5e-9 of the peak at T_max 1e5
    and a floor of 0.1.
    """
    floor = plan.floor_ratio * peak if plan.floor_rate is None else plan.floor_rate
    allowed = TOLERANCE * max(1, plan.steps / _TOLERANCE_STEPS) * max(peak, floor)
    if plan.name == "chapter" and plan.warmup_steps + plan.t_max < plan.steps:
        allowed += sys.float_info.epsilon * plan.t_max**2 * max(peak, floor)
    return allowed


def check_plan(plan: Plan, peaks: Sequence[float]) -> None:
    """Walks the whole schedule, and a little past its end, before the first step is taken.

    A plan of more than MAX_WALK steps is walked shrunk in proportion, all its phases kept.
    """
    short = plan.scaled(MAX_WALK) if plan.steps > MAX_WALK else plan
    walk(short, peaks, short.steps + 10)
