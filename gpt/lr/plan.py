"""A run before its first step: sizes, costs, the rate, and what looks wrong. Writes nothing.

How the plan is shown on a terminal is `cli.lr_plan`'s business, the rules are `lint`'s.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gpt.build import CHARS_GUESS, assemble_without_text, choose, expected_vocab_size
from gpt.config import Config, schedule_problems
from gpt.corpus import source_files
from gpt.course import Course, RateJump
from gpt.data import TokenData, cached_data
from gpt.device import (
    DTYPES,
    compile_blocks,
    on_meta,
    pick_compile,
    pick_device,
    pick_dtype,
    rough_seconds,
    seed_everything,
    set_threads,
    synchronize,
)
from gpt.errors import UserError
from gpt.lr.findings import Finding, facts_of
from gpt.lr.lint import lint, unchecked
from gpt.lr.memory import Memory, estimate_memory
from gpt.lr.plan_start import planned_course, planned_start
from gpt.model import GPT, ParameterRow, count_parameters, flops_per_token, parameter_inventory
from gpt.plan import Plan
from gpt.ratepolicy import RateChange, RatePolicy
from gpt.schedule import build_scheduler
from gpt.step import train_step

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Group:
    """A parameter group with a rate of its own: its name and its peak, by the last plan."""

    name: str
    peak: float


@dataclass(frozen=True)
class RunPlan:
    """Everything that can be known of a run before it trains; None for what cannot.

    `open_points` says in words what is not known, why, and how to get it, `warnings` what speaks
    against this machine. `schedule` is the plan that the run ends with, and `course` the rate of
    all its steps: they differ where the rate of a run was changed on the way, in the `past` or by
    the policy that is asked for, with its `jump`.
    """

    config: Config
    schedule: Plan
    course: Course
    past: tuple[RateChange, ...]
    jump: RateJump | None
    notes: tuple[str, ...]
    groups: list[Group]
    rows: list[ParameterRow]
    counted: int
    vocab_size: int
    epochs: float | None
    memory: Memory
    flops_per_step: int
    findings: list[Finding]
    unchecked: list[str]
    open_points: list[str]
    choices: list[str]
    warnings: list[str]
    seconds_per_step: float | None
    rough_seconds: float | None

    def rates(self, group: Group) -> list[tuple[str, int, float]]:
        """The rate's key values in a group: first, peak and end, each with its step."""
        course, name = self.course, group.name
        steps = {"first": 0, "peak": course.highest(name), "end": course.total_steps - 1}
        return [(which, step, course.rate(step, name)) for which, step in steps.items()]

    def as_json(self) -> dict[str, Any]:
        """What `gpt-lr plan --json` prints."""
        rows = [{"name": row.name, "formula": row.formula, "count": row.count} for row in self.rows]
        total = self.schedule.total_steps
        return {
            "parameters": {"total": self.counted, "rows": rows},
            "vocab_size": self.vocab_size,
            "tokens_per_step": self.config.tokens_per_step,
            "steps": total,
            "tokens": total * self.config.tokens_per_step,
            "epochs": self.epochs,
            "memory_bytes": self.memory.total,
            "memory": asdict(self.memory),
            "process_bytes": self.memory.process,
            "flops_per_step": self.flops_per_step,
            "flops": self.flops_per_step * total,
            "seconds_per_step": self.seconds_per_step,
            "seconds": None if self.seconds_per_step is None else self.seconds_per_step * total,
            "rough_seconds": self.rough_seconds,
            "schedule": {
                "name": self.schedule.name,
                "phases": [
                    {"name": name, "first_step": first, "end_step": end}
                    for name, first, end in self.course.phases()
                ],
                "policy": None
                if self.jump is None
                else {"step": self.jump.change.step, **self.jump.values()},
                "earlier": [change.model_dump(mode="json") for change in self.past],
                "rates": {
                    group.name: {
                        name: {"step": step, "lr": lr} for name, step, lr in self.rates(group)
                    }
                    for group in self.groups
                },
            },
            "findings": [asdict(finding) for finding in self.findings],
            "unchecked": self.unchecked,
            "open": self.open_points,
            "warnings": self.warnings,
        }


def make_plan(
    config: Config,
    *,
    rate: RatePolicy | None = None,
    at_step: int | None = None,
    measure_steps: int = 0,
    on_step: Callable[[], object] | None = None,
) -> RunPlan:
    """Plans a run without building data, model or run directory.

    With a `rate` policy it is the run as it would go on so from its newest checkpoint, or from
    another step; without one, a run of this very config that has changed its rate is planned with
    the rates that it had.

    With `measure_steps`, that many real steps on random tokens are timed on the run's own device;
    `on_step` is called after each.

    Raises UserError for what no plan can be made of.
    """
    open_points: list[str] = []
    data = _tokenized(config, open_points)
    vocab_size = _vocabulary(config, data, open_points)
    start = planned_start(config, rate, at_step)
    config = start.config
    total_steps = _total_steps(config, data)
    schedule = Plan.from_config(config, total_steps, strict=False)
    with on_meta():
        model = GPT(config.model, vocab_size)
    counted = count_parameters(model)
    rows = parameter_inventory(config.model, vocab_size)
    assert counted == sum(row.count for row in rows), "the inventory's formulas are wrong"
    course, jump = planned_course(start, schedule, model, partial(_total_steps, data=data))
    device, dtype, choices, warnings = _machine(config, vocab_size, total_steps, open_points)
    facts = facts_of(counted, data, device)
    seconds, flops = None, flops_per_token(config.model, vocab_size) * config.tokens_per_step
    if measure_steps:
        seconds = _measure(config, vocab_size, schedule, measure_steps, on_step)
    return RunPlan(
        config=config,
        schedule=schedule,
        course=course,
        past=start.past,
        jump=jump,
        notes=start.notes,
        groups=_groups(course),
        rows=rows,
        counted=counted,
        vocab_size=vocab_size,
        epochs=facts.epochs(config, schedule),
        memory=estimate_memory(config, vocab_size, dtype),
        flops_per_step=flops,
        findings=lint(config, schedule, facts),
        unchecked=unchecked(config, facts),
        open_points=open_points,
        choices=choices,
        warnings=warnings,
        seconds_per_step=seconds,
        rough_seconds=None if device is None else rough_seconds(device, flops * total_steps),
    )


def _tokenized(config: Config, open_points: list[str]) -> TokenData | None:
    """The tokenized text, if it is there: tokenizing a large one is not a plan's business."""
    try:
        files = source_files(config.data)
    except UserError as error:  # a run may be planned before its text is there
        reasons = "; ".join(error.lines)
        open_points.append(f"epochs and what depends on them, for there is no text: {reasons}")
        return None
    data = cached_data(config)
    if data is None:
        size = sum(path.stat().st_size for path in files)
        open_points.append(
            f"epochs and what depends on them: the text ({len(files):,} files, {size:,} bytes) is "
            "not tokenized yet; gpt-data build with this config does it"
        )
    return data


def _vocabulary(config: Config, data: TokenData | None, open_points: list[str]) -> int:
    """The number of ids, exact where it is known before the text is read."""
    if data is not None:
        return data.tokenizer.vocab_size
    if config.tokenizer.kind == "chars":
        open_points.append(
            f"the number of characters: the model is planned with {CHARS_GUESS} ids until the text "
            "is tokenized"
        )
    return expected_vocab_size(config.tokenizer)


def _total_steps(config: Config, data: TokenData | None) -> int:
    train = config.train
    if data is None and train.max_steps is None and train.max_tokens is None:
        raise UserError(
            f"train.max_epochs {train.max_epochs:g}: how many steps that is, only the tokenized "
            "text tells; say gpt-data build with this config first, or give --train.max_steps"
        )
    if data is None:  # an epoch as long as can be: the other limits come first
        total = config.total_steps(epoch_tokens=10**18)
    else:
        total = config.total_steps(data.train.n_tokens)
    problems = [found for found in schedule_problems(config, total) if found.lint is None]
    if problems:
        raise UserError(*(f"{found.keys[0]}: {found.message}" for found in problems))
    return total


def _machine(
    config: Config, vocab_size: int, total_steps: int, open_points: list[str]
) -> tuple[torch.device | None, torch.dtype, list[str], list[str]]:
    """The device, its number format, why, and what speaks against it there.

    A run may be planned on another machine than its own. Without its device the format is the one
    asked for, bf16 for auto.
    """
    wish = config.train.dtype
    try:
        device = pick_device(config.train.device)
    except UserError as error:
        dtype = torch.bfloat16 if wish == "auto" else DTYPES[wish]
        name = str(dtype).removeprefix("torch.")
        open_points.append(f"the device is not in this machine, memory is that of {name} ({error})")
        return None, dtype, [], []
    try:
        choices = choose(config, vocab_size, total_steps)
    except UserError as error:  # a step does not fit, or cannot be compiled
        dtype, lines = _picked(config, device, vocab_size, total_steps)
        return device, dtype, lines, [f"refused  gpt-train would not begin here: {error}"]
    return choices.device, choices.dtype, choices.lines, choices.warnings


def _picked(
    config: Config, device: torch.device, vocab_size: int, total_steps: int
) -> tuple[torch.dtype, list[str]]:
    """The number format and the lines of a choice that was refused, as far as it goes."""
    rows = parameter_inventory(config.model, vocab_size)
    matrices = sum(row.count for row in rows if "W" in row.name or row.name == "FFN")
    dtype, reason = pick_dtype(config.train.dtype, device, matrices)
    lines = [f"device   {device}", f"dtype    {reason}"]
    flops = flops_per_token(config.model, vocab_size) * config.tokens_per_step * total_steps
    with suppress(UserError):
        lines.append(f"compile  {pick_compile(config.train.compile, device, flops)[1]}")
    return dtype, lines


def _groups(course: Course) -> list[Group]:
    """The optimizer's groups, one for each rate of its own, the one at `lr` first."""
    last = course.stretches[-1]
    groups: dict[tuple[float, ...], Group] = {}
    for name, peak in last.peaks.items():
        groups.setdefault(course.peaks(name), Group(name, peak))
    return list(groups.values())


def _measure(
    config: Config,
    vocab_size: int,
    schedule: Plan,
    steps: int,
    on_step: Callable[[], object] | None,
) -> float:
    """Seconds of a step: the median of real ones on random tokens, after some to warm up."""
    set_threads()
    choices = choose(config, vocab_size, schedule.total_steps)
    device = choices.device
    seed_everything(config.run.seed)
    training = assemble_without_text(config, vocab_size, device, choices.dtype)
    training.scheduler = build_scheduler(training.optimizer, schedule)
    if choices.compile:
        compile_blocks(training.model.blocks)
    shape = (config.train.batch_size, config.model.context_len)
    took = []
    for _ in range(WARM_UP_STEPS + steps):
        rows = torch.randint(vocab_size, shape)
        synchronize(device)
        start = time.perf_counter()
        train_step(training, rows, rows)
        synchronize(device)
        took.append(time.perf_counter() - start)
        if on_step is not None:
            on_step()
    return statistics.median(took[WARM_UP_STEPS:])
