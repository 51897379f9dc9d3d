"""A plan's rate as a table and as a picture."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.course import Course, RateJump
from gpt.errors import UserError
from gpt.lr.plan import Group, RunPlan
from gpt.plan import Plan
from gpt.schedule import walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN_POINTS = 2000
MARKED_PHASES = 40
LABELLED_SHARE = 0.08  # of the run: in a shorter phase its name has no room


def write_csv(plan: RunPlan, path: Path) -> None:
    """The rate of every step, as torch's own scheduler gives it: a row a step, a column a group."""
    names = ["lr", *(f"lr_{group.name}" for group in plan.groups[1:])]
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *names])
            for step, rates in enumerate(_all_rates(plan)):
                writer.writerow([step, *map(repr, rates)])
    except OSError as error:
        raise _unwritable("--csv", path, error) from None


def _all_rates(plan: RunPlan) -> Iterator[tuple[float, ...]]:
    """The rates of every step in the plan's groups, from the plan that holds for the step."""
    for stretch, end in plan.course.bounded():
        origin = stretch.plan.origin
        peaks = [stretch.peaks[group.name] for group in plan.groups]
        yield from walk(stretch.plan, peaks, end - origin)[stretch.first_step - origin :]


def draw_png(plan: RunPlan, path: Path) -> None:
    """The rate over the steps, a line for each group, the phases marked.

    Where a policy changes the rate, what it would have been is there too, dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gpt.plot import FAINT, INK

    course = plan.course
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    top = _draw_rates(axes, plan)
    axes.set_ylim(0, 1.18 * top or 1.0)
    axes.set_xlim(0, max(1, course.total_steps - 1))
    phases = course.phases()
    for index, (name, first, end) in enumerate(phases):
        if index > 0 and len(phases) <= MARKED_PHASES:
            axes.axvline(first, color=INK, linewidth=0.8, linestyle=":")
        if (end - first) / course.total_steps >= LABELLED_SHARE:
            axes.annotate(
                name, (first, 1.15 * top), xytext=(4, 0), textcoords="offset points",
                va="top", fontsize=9, color=INK,
            )  # fmt: skip
    if len(plan.groups) > 1:
        figure.legend(edgecolor="none", fontsize=9, loc="outside lower center", ncols=3)
    axes.set_ylabel("learning rate")
    axes.set_xlabel(f"optimizer step ({phases_text(course)})")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    title = f"{plan.config.run.name}: {plan.schedule.name}"
    if plan.jump is not None:
        change = plan.jump.change
        title += f", {change.policy} from step {change.step:,} on (dashed: without it)"
        axes.axvline(change.step, color=INK, linewidth=1.2)
    figure.suptitle(title, fontsize=12, color=INK)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise _unwritable("--png", path, error) from None


def _draw_rates(axes: "Axes", plan: RunPlan) -> float:
    """Draws a line for each group; returns the highest rate."""
    from gpt.plot import RATE, TRAIN, VAL

    steps, top = list(drawn_steps(plan.course)), 0.0
    for group, color in zip(plan.groups, (RATE, VAL, TRAIN), strict=False):
        rates = [plan.course.rate(step, group.name) for step in steps]
        label = f"{group.name}: peak {group.peak:.3g}"
        axes.plot(steps, rates, color=color, linewidth=1.8, label=label)
        top = max(top, *rates)
        if plan.jump is not None:
            without, old_rates = _without_change(plan, plan.jump, group)
            axes.plot(without, old_rates, color=color, linewidth=1.0, linestyle="--")
            top = max([top, *old_rates])
    return top


def _without_change(plan: RunPlan, jump: RateJump, group: Group) -> tuple[list[int], list[float]]:
    """Steps and rates that the plan before the change would have gone on with."""
    before, first = plan.course.stretches[-2], jump.change.step
    last = min(before.plan.total_steps, plan.course.total_steps) - 1
    drawn = {first, *drawn_steps(before.plan)}
    steps = sorted(step for step in drawn if first <= step <= last)
    return steps, [before.plan.rate(step, before.peaks[group.name]) for step in steps]


def phases_text(schedule: Plan | Course) -> str:
    """The phases and their steps in words; of many cycles only the first and the last."""
    named = [f"{name} {first:,}-{end - 1:,}" for name, first, end in schedule.phases()]
    return ", ".join(named if len(named) <= 6 else [*named[:2], "…", named[-1]])


def drawn_steps(schedule: Plan | Course, points: int = DRAWN_POINTS) -> Iterator[int]:
    """Steps that show the schedule's course: evenly spaced ones, and the ends of its phases."""
    last = schedule.total_steps - 1
    even = {round(index * last / max(1, points - 1)) for index in range(points)}
    ends = {step for _, first, end in schedule.phases() for step in (first, end - 1)}
    yield from sorted(step for step in even | ends if step >= min(ends))


def _unwritable(option: str, path: Path, error: OSError) -> UserError:
    return UserError(
        f"{option}: {path}: cannot be written: {error.strerror}; name a file in an existing folder"
    )
