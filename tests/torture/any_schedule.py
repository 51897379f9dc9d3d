"""Test 15: any schedule, at every step, past its end, saved and resumed anywhere."""

import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpt.config import LEAST_RATE, Config, ScheduleName, schedule_problems
from gpt.configfile import load_config
from gpt.errors import UserError
from gpt.plan import Plan
from gpt.schedule import (
    TOLERANCE,
    advance_scheduler,
    build_scheduler,
    check_plan,
    load_scheduler,
    tolerance,
)
from tests.torture import Torture

NAMES = get_args(ScheduleName)
WARMUPS = ("none", "one step", "some", "all but one", "full", "too long")
FALLING = set(NAMES) - {"constant", "chapter", "cosine_restarts"}
LONG_EVERY, HUGE_EVERY = 61, 499  # primes: they meet every name and warmup
Rates = list[list[float]]


def build(plan: Plan, peaks: list[float]) -> tuple[Optimizer, LRScheduler]:
    """The plan's scheduler over groups of these peaks."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups)
    return optimizer, build_scheduler(optimizer, plan)


def rates(optimizer: Optimizer) -> list[float]:
    """The rate of each group now."""
    return [group["lr"] for group in optimizer.param_groups]


def run(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> Rates:
    """The rates of the next steps."""
    seen = []
    for _ in range(steps):
        seen.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    return seen


def case(index: int, rng: random.Random, folder: Path) -> str:
    """One plan: straight from numbers, or by way of a config."""
    name, warmup = NAMES[index % len(NAMES)], WARMUPS[index // len(NAMES) % len(WARMUPS)]
    if index % HUGE_EVERY == HUGE_EVERY - 1:
        return huge(name, warmup, rng)
    longest = 6_000 if index % LONG_EVERY == LONG_EVERY - 1 else rng.choice([3, 12, 80, 300])
    total = rng.randint(1, longest)
    if index // (len(NAMES) * len(WARMUPS)) % 2:
        plan, peaks = from_numbers(name, warmup, total, rng)
        way = "numbers"
    else:
        config = any_config(name, warmup, total, rng)
        problems = list(schedule_problems(config, total))
        try:
            plan = Plan.from_config(config, total)
        except UserError as refused:
            assert problems, f"refused without a problem: {refused}"
            return "refused: " + problems[0].keys[0]
        assert not problems
        way, peaks = "a config", peaks_of(config, rng)
    check_every_step(plan, peaks, rng)
    check_resumed(plan, peaks, rng)
    length = "long" if longest > 300 else "short"
    return f"{length}, from {way}, warmup {warmup}"


def warmup_of(kind: str, total: int, rng: random.Random) -> int:
    """Steps of a warmup in a run of `total`."""
    return {
        "none": 0,
        "one step": 1,
        "some": rng.randint(0, total),
        "all but one": total - 1,
        "full": total,
        "too long": total + rng.randint(1, 2 * total),
    }[kind]


def magnitude(rng: random.Random, low: float, high: float) -> float:
    """A number whose logarithm is anywhere in between."""
    return 10 ** rng.uniform(math.log10(low), math.log10(high))


def from_numbers(
    name: ScheduleName, warmup: str, total: int, rng: random.Random
) -> tuple[Plan, list[float]]:
    """A plan that no config could give as well: a floor above the peak, a warmup cut off."""
    origin = rng.choice([0, 0, 0, rng.randint(1, 10**7)])
    plan = Plan(
        name=name,
        total_steps=origin + total,
        warmup_steps=warmup_of(warmup, total, rng),
        start_factor=rng.choice([1.0, 1e-12, rng.uniform(1e-9, 1)]),
        floor_ratio=rng.choice([0.0, 1.0, 1e-9, rng.random(), rng.uniform(1, 3)]),
        decay_steps=rng.choice([None, 1, rng.randint(1, 2 * total)]),
        decay_shape=rng.choice(["sqrt", "linear"]),
        power=rng.choice([1.0, 2.0, 0.5, 100.0, 1e-6, rng.uniform(0.1, 8)]),
        cycles=rng.choice([1, 2, rng.randint(1, 2 * total), 1000]),
        cosine_steps=rng.choice([None, 1, total, rng.randint(1, 2 * total), 10**9]),
        floor_rate=rng.choice([None, 0.0, 1e-5, 10 ** rng.uniform(-12, 0)])
        if name == "chapter"
        else None,
        origin=origin,
    )
    return plan, [magnitude(rng, 1e-9, 1e3) for _ in range(rng.choice([1, 2, 3, 3]))]


def any_config(name: str, warmup: str, total: int, rng: random.Random) -> Config:
    """A config whose values are in range, each alone."""
    lr = rng.choice([3e-4, 1e3, 1e-12, LEAST_RATE, magnitude(rng, 1e-8, 1)])
    steps = warmup_of(warmup, total, rng)
    given: dict[str, Any] = {
        "optimizer.lr": lr,
        "schedule.name": name,
        "schedule.start_factor": rng.choice([1.0, 1e-9, rng.uniform(1e-9, 1)]),
        "schedule.power": rng.choice([1, 100, 1e-300, rng.uniform(0.1, 8)]),
        "schedule.cycles": rng.choice([1, 4, 1000, rng.randint(1, min(total, 1000))])
        if total < 2000
        else rng.randint(1, 20),
        "schedule.decay_shape": rng.choice(["sqrt", "linear"]),
        "train.max_epochs": 1,  # the length comes from elsewhere: none of it is checked in loading
    }
    if rng.random() < 0.5:
        given["schedule.warmup_steps"] = steps
    else:
        given["schedule.warmup_fraction"] = min(1.0, steps / total)
    if rng.random() < 0.5:
        given["schedule.min_lr"] = lr * rng.choice([0, 1, 1e-6, rng.random()])
    elif name == "chapter":
        given["schedule.min_lr"] = min(lr, 1e-5)
    match rng.randrange(3):
        case 0:
            given["schedule.decay_steps"] = rng.choice([1, total, rng.randint(1, total)])
        case 1:
            given["schedule.decay_fraction"] = rng.choice([1.0, 1e-300, rng.uniform(0.01, 1)])
    if rng.random() < 0.5:
        given["schedule.cosine_steps"] = rng.choice([1, total, rng.randint(1, 2 * total), 2**62])
    if name == "hf_cosine":
        given.pop("schedule.min_lr", None)
    return load_config(None, [(key, repr(value).strip("'")) for key, value in given.items()])


def peaks_of(config: Config, rng: random.Random) -> list[float]:
    """Peaks of groups: the config's, and what muon and muP make of it."""
    lr = config.optimizer.lr
    return [
        lr,
        *rng.sample([lr / 3, lr * 65536, 1e3, LEAST_RATE, 1e-5, lr / 1e6], rng.randrange(3)),
    ]


def check_every_step(plan: Plan, peaks: list[float], rng: random.Random) -> None:
    """All that is promised of the rates of a run, and of what comes after it."""
    past = rng.choice([1, 12, plan.steps + 5])
    seen = run(*build(plan, peaks), plan.steps + past)
    for group, peak in enumerate(peaks):
        mine = [now[group] for now in seen]
        slack = tolerance(plan, peak)
        floor = plan.floor_ratio * peak if plan.floor_rate is None else plan.floor_rate
        within = plan.name != "chapter" or plan.warmup_steps + plan.t_max >= plan.steps
        assert slack <= TOLERANCE * max(peak, floor) or not within
        for step, rate in enumerate(mine):
            wanted = plan.rate(plan.origin + step, peak)
            about = (plan, peak, step, rate, wanted)
            assert abs(rate - wanted) <= slack, about
            assert 0 <= rate <= max(peak, floor) + slack, about
            assert abs(wanted - peak * textbook(plan, step, peak)) <= slack, about
        end = plan.steps
        assert mine[end:] == mine[end : end + 1] * past, ("moves after its end", plan, peak)
        assert mine[end] <= mine[end - 1] + slack, ("rises after its end", plan, peak)
        if plan.name in FALLING and floor <= peak:
            fall = mine[min(plan.warmup_steps, end) : end]
            assert all(b <= a + slack for a, b in pairwise(fall)), (plan, peak)
    if plan.steps < 1000:
        check_plan(plan, peaks)


def textbook(plan: Plan, step: int, peak: float) -> float:
    """The share of the peak, written down anew from what the config says of each schedule."""
    floor = plan.floor_ratio
    if plan.name == "chapter" and plan.floor_rate is not None:
        floor = plan.floor_rate / peak
    warmup, total = plan.warmup_steps, plan.steps
    if step >= total:
        last = textbook(plan, total - 1, peak)
        return last if plan.name in ("constant", "inverse_sqrt", "chapter") else min(last, floor)
    if step < warmup:
        first = 0 if plan.name == "hf_cosine" else plan.start_factor
        return first + (1 - first) * step / warmup
    if plan.name == "constant":
        return 1.0
    if plan.name == "inverse_sqrt":
        return max(floor, math.sqrt(max(1, warmup) / max(1, warmup, step)))
    return floor + (1 - floor) * _height(plan, step)


def _height(plan: Plan, step: int) -> float:
    """How high over its floor a shape that falls is."""
    warmup, total = plan.warmup_steps, plan.steps
    done = (step - warmup) / max(1, total - 1 - warmup)
    match plan.name:
        case "linear":
            return 1 - done
        case "polynomial":
            return (1 - done) ** plan.power
        case "hf_cosine":
            done = (step - warmup) / (total - warmup)
        case "chapter":
            done = (step - warmup) / (plan.cosine_steps or total)
        case "cosine_restarts":
            done = _restarts(plan, step)
        case "wsd":
            tail = plan.decay_steps or max(1, round(total / 5))
            top = max(warmup, max(warmup, total - tail) - 1)
            done = max(0, step - top) / max(1, total - 1 - top)
            return 1 - (done if plan.decay_shape == "linear" else math.sqrt(done))
    return (1 + math.cos(math.pi * done)) / 2


def _restarts(plan: Plan, step: int) -> float:
    rest = plan.steps - plan.warmup_steps
    cuts = sorted({plan.warmup_steps + i * rest // plan.cycles for i in range(plan.cycles + 1)})
    start = max(cut for cut in cuts if cut <= step)
    end = min(cut for cut in cuts if cut > step)
    return (step - start) / max(1, end - start - 1)


def check_resumed(plan: Plan, peaks: list[float], rng: random.Random) -> None:
    """Saved after any step as plain data and loaded into a fresh one, all rates stay to the bit."""
    stop, ahead = rng.randint(0, plan.steps + 3), plan.steps + 10
    optimizer, scheduler = build(plan, peaks)
    before = run(optimizer, scheduler, stop)
    state = json.loads(json.dumps(scheduler.state_dict()))
    saved = optimizer.state_dict()
    after = run(optimizer, scheduler, ahead - stop)
    optimizer, scheduler = build(plan, peaks)
    optimizer.load_state_dict(saved)
    load_scheduler(scheduler, state)
    assert run(optimizer, scheduler, ahead - stop) == after, ("resumed at", stop, plan, peaks)
    assert before + after == run(*build(plan, peaks), ahead), (plan, peaks)
    optimizer, scheduler = build(plan, peaks)
    advance_scheduler(optimizer, scheduler, plan, plan.origin + stop)
    assert run(optimizer, scheduler, ahead - stop) == after, ("advanced to", stop, plan, peaks)


def huge(name: ScheduleName, warmup: str, rng: random.Random) -> str:
    """A plan too long to be walked: shrunk, all its phases kept."""
    total = rng.choice([10**6, 10**9, 2**53, 10**15])
    plan, peaks = from_numbers(name, warmup, total, rng)
    check_plan(plan, peaks)
    for step in (0, plan.warmup_steps, total // 2, total - 1, total, total + 10**6):
        share = plan.factor(plan.origin + step, peaks[0])
        assert math.isfinite(share) and share >= 0
        assert share <= max(1.0, plan.floor_ratio, (plan.floor_rate or 0) / peaks[0]) * (
            1 + 1e3 * sys.float_info.epsilon
        ), (plan, peaks, step)
    return "too long to walk"


TORTURE = Torture(
    title="any schedule: every step, overrun, no and full warmup, up to three groups, resumed "
    "anywhere",
    promise="torch's scheduler equals the closed form and the textbook to 1e-11 of the peak; "
    "never negative, never above the peak, never rises after its end; resumed to the bit",
    full=10_000,
    short=60,
    case=case,
    chunk=30,
)
