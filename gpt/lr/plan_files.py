"""A plan's rate as a table and as a picture."""

import csv
from collections.abc import Iterator
from pathlib import Path

from gpt.errors import UserError
from gpt.lr.plan import RunPlan
from gpt.plan import Plan
from gpt.schedule import walk

DRAWN_POINTS = 2000
MARKED_PHASES = 40
LABELLED_SHARE = 0.08  # of the run: in a shorter phase its name has no room


def write_csv(plan: RunPlan, path: Path) -> None:
    """The rate of every step, as torch's own scheduler gives it: a row a step, a column a group."""
    names = ["lr", *(f"lr_{group.name}" for group in plan.groups[1:])]
    rows = walk(plan.schedule, [group.peak for group in plan.groups])
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *names])
            for step, rates in enumerate(rows):
                writer.writerow([step, *map(repr, rates)])
    except OSError as error:
        raise _unwritable("--csv", path, error) from None


def draw_png(plan: RunPlan, path: Path) -> None:
    """The rate over the steps, a line for each group, the phases marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gpt.plot import FAINT, INK, RATE, TRAIN, VAL

    schedule = plan.schedule
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = list(drawn_steps(schedule))
    for group, color in zip(plan.groups, (RATE, VAL, TRAIN), strict=False):
        rates = [schedule.rate(step, group.peak) for step in steps]
        label = f"{group.name}: peak {group.peak:.3g}"
        axes.plot(steps, rates, color=color, linewidth=1.8, label=label)
    top = max(schedule.rate(step, group.peak) for step in steps for group in plan.groups)
    axes.set_ylim(0, 1.18 * top or 1.0)
    axes.set_xlim(0, max(1, schedule.total_steps - 1))
    phases = schedule.phases()
    for index, (name, first, end) in enumerate(phases):
        if index > 0 and len(phases) <= MARKED_PHASES:
            axes.axvline(first, color=INK, linewidth=0.8, linestyle=":")
        if (end - first) / schedule.total_steps >= LABELLED_SHARE:
            axes.annotate(
                name, (first, 1.15 * top), xytext=(4, 0), textcoords="offset points",
                va="top", fontsize=9, color=INK,
            )  # fmt: skip
    if len(plan.groups) > 1:
        figure.legend(edgecolor="none", fontsize=9, loc="outside lower center", ncols=3)
    axes.set_ylabel("learning rate")
    axes.set_xlabel(f"optimizer step ({phases_text(schedule)})")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    figure.suptitle(f"{plan.config.run.name}: {schedule.name}", fontsize=12, color=INK)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise _unwritable("--png", path, error) from None


def phases_text(schedule: Plan) -> str:
    """The phases and their steps in words; of many cycles only the first and the last."""
    named = [f"{name} {first:,}-{end - 1:,}" for name, first, end in schedule.phases()]
    return ", ".join(named if len(named) <= 6 else [*named[:2], "…", named[-1]])


def drawn_steps(schedule: Plan, points: int = DRAWN_POINTS) -> Iterator[int]:
    """Steps that show the schedule's course: evenly spaced ones, and the ends of its phases."""
    last = schedule.total_steps - 1
    even = {round(index * last / max(1, points - 1)) for index in range(points)}
    ends = {step for _, first, end in schedule.phases() for step in (first, end - 1)}
    yield from sorted(even | ends)


def _unwritable(option: str, path: Path, error: OSError) -> UserError:
    return UserError(
        f"{option}: {path}: cannot be written: {error.strerror}; name a file in an existing folder"
    )
