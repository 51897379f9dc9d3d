"""The command `gpt-lr plan`: a run before its first step, on a page."""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.cli.arguments import RATE_POLICIES
from gpt.errors import UserError, json_line, say

if TYPE_CHECKING:
    from gpt.configfile import Override
    from gpt.lr.plan import RunPlan

MEASURED_STEPS = 5
MOST_MEASURED = 10_000
PLOT_WIDTH, PLOT_HEIGHT = 100, 14
NARROWEST = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--rate",
        choices=RATE_POLICIES,
        help="how the run would go on from its newest checkpoint, as gpt-train --rate would: the "
        "rates that it had until then, and those of the policy from then on",
    )
    parser.add_argument(
        "--at", type=_step, metavar="STEP", help="with --rate: as if that checkpoint were of STEP"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rate of every step")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the rate")
    parser.add_argument(
        "--measure",
        type=_steps,
        nargs="?",
        const=MEASURED_STEPS,
        default=0,
        metavar="STEPS",
        help=f"time real steps on the run's device (default {MEASURED_STEPS})",
    )


def run(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> None:
    """Plans, and prints or writes what was asked for."""
    from tqdm import tqdm

    from gpt.configfile import load_config

    if arguments.at is not None and arguments.rate in (None, "keep"):
        raise UserError(
            f"--at {arguments.at}: the step at which a policy sets in; give --rate extend, rewarm "
            "or override too"
        )
    config = load_config(arguments.config, overrides, for_lint=True)
    from gpt.lr.plan import WARM_UP_STEPS, make_plan
    from gpt.lr.plan_files import draw_png, write_csv

    steps = arguments.measure
    with tqdm(
        total=steps + WARM_UP_STEPS, desc="measuring", unit="step", disable=None if steps else True
    ) as bar:
        plan = make_plan(
            config,
            rate=arguments.rate,
            at_step=arguments.at,
            measure_steps=steps,
            on_step=bar.update,
        )
    for note in plan.notes:
        say(note)
    for path, write in ((arguments.csv, write_csv), (arguments.png, draw_png)):
        if path is not None:
            write(plan, path)
            say(f"wrote {path}")
    if arguments.json:
        print(json_line(plan.as_json()))
    else:
        print("\n".join(page(plan, shutil.get_terminal_size((PLOT_WIDTH, 24)).columns)))


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        steps = 0
    if not 1 <= steps <= MOST_MEASURED:
        raise UserError(f"--measure {text}: not a number of steps from 1 to {MOST_MEASURED:,}")
    return steps


def _step(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--at {text}: not a step of the run; give a whole number from 1 on")
    return int(text)


def page(plan: "RunPlan", width: int) -> Iterator[str]:
    """The plan as lines for a terminal of `width` columns."""
    yield from _parameters(plan)
    yield ""
    yield from _costs(plan)
    yield ""
    yield from _rate(plan, width)
    yield ""
    yield from _findings(plan)


def _parameters(plan: "RunPlan") -> Iterator[str]:
    model = plan.config.model
    names = max(len(row.name) for row in plan.rows)
    formulas = max(len(row.formula) for row in plan.rows)
    counts = len(f"{plan.counted:,}")
    yield (
        f"parameters (d = {model.n_embd}, d_ff = {model.hidden}, layers = {model.n_layer}, "
        f"context = {model.context_len:,}, V = {plan.vocab_size:,})"
    )
    for row in plan.rows:
        yield f"  {row.name:{names}}  {row.formula:{formulas}}  {row.count:>{counts},}"
    counted = "counted in the model"
    yield f"  {'total':{names}}  {counted:{formulas}}  {plan.counted:>{counts},}"


def _costs(plan: "RunPlan") -> Iterator[str]:
    config, schedule, memory = plan.config, plan.schedule, plan.memory
    steps, tokens = schedule.total_steps, config.tokens_per_step
    micro = config.train.micro_batch_size or config.train.batch_size
    split = f" in micro-batches of {micro}" if micro < config.train.batch_size else ""
    epochs = "epochs open" if plan.epochs is None else f"{plan.epochs:,.2f} epochs"
    batch = f"{config.train.batch_size} x {config.model.context_len:,}"
    yield f"step     {batch} = {tokens:,} tokens{split}"
    yield f"run      {steps:,} steps, {steps * tokens:,} tokens, {epochs}"
    flops = plan.flops_per_step
    yield f"compute  {flops:.3g} floating-point operations a step, {flops * steps:.3g} in the run"
    if plan.seconds_per_step is not None:
        together = _hours(plan.seconds_per_step * steps)
        yield (
            f"time     {plan.seconds_per_step:.3g} s a step, {together} for all; evaluations and "
            "checkpoints come on top"
        )
    elif plan.rough_seconds is not None:
        about = _hours(float(f"{plan.rough_seconds:.2g}"))
        yield (
            f"time     about {about} for all steps, by a rough estimate that may be several times "
            "off; --measure times real ones"
        )
    yield (
        f"memory   {_bytes(memory.total)} at most: weights {_bytes(memory.weights)}, gradients "
        f"{_bytes(memory.gradients)}, optimizer {_bytes(memory.optimizer)}, activations "
        f"{_bytes(memory.activations)}, update {_bytes(memory.update)}; not all at once. On a CPU "
        f"the whole process holds about {_bytes(memory.process)}"
    )
    yield from plan.choices
    yield from plan.warnings
    for point in plan.open_points:
        yield f"open     {point}"


def _rate(plan: "RunPlan", width: int) -> Iterator[str]:
    from gpt.lr.plan_files import phases_text

    optimizer = plan.config.optimizer
    yield f"rate     {optimizer.name}, {plan.schedule.name}"
    yield from _plot(plan, min(width, PLOT_WIDTH))
    many = len(plan.groups) > 1
    for group in plan.groups:
        values = [f"{name} {lr:.3g} at step {step:,}" for name, step, lr in plan.rates(group)]
        yield f"  {group.name + ': ' if many else ''}{', '.join(values)}"
    yield f"  {phases_text(plan.course)}"
    for change in plan.past:
        yield f"changed  {change.policy} at step {change.step:,}: {change.keys_text()}"
    if plan.jump is not None:
        yield plan.jump.line()


def _plot(plan: "RunPlan", width: int) -> list[str]:
    """The rate of the first group over the steps, drawn in characters; nothing if too narrow."""
    if width < NARROWEST:
        return []
    from gpt.lr.plan_files import drawn_steps
    from gpt.textplot import TextPlot

    course, name = plan.course, plan.groups[0].name
    steps = list(drawn_steps(course, 4 * width))
    rates = [course.rate(step, name) for step in steps]
    top = max(rates) or plan.groups[0].peak  # hf_cosine's first step is at 0
    last = max(1, course.total_steps - 1)
    fancy = (sys.stdout.encoding or "ascii").lower().replace("-", "").startswith("utf")
    plot = TextPlot(width, PLOT_HEIGHT, last, fancy=fancy)
    plot.figure.draw(plot.figure.signal(steps, rates, marker=plot.marker))
    return plot.lines(1.05 * top, (0, top), 2)


def _findings(plan: "RunPlan") -> Iterator[str]:
    for finding in plan.findings:
        yield f"lint     {finding.id}: {finding.message}"
        yield f"         → {finding.remedy}"
        yield f"         source: {finding.source}"
    if not plan.findings:
        yield "lint     nothing looks wrong"
    if plan.unchecked:
        yield f"         not checked yet (see open): {', '.join(plan.unchecked)}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _hours(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
