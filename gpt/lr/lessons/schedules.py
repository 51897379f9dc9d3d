"""Section 17.6: all nine schedules, walked by torch; the chapter's, as is and corrected."""

from dataclasses import dataclass
from typing import get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from gpt.config import ScheduleName
from gpt.lr.lessons.picture import BLUE, GREEN, GREY, VERMILION, legend, new_figure, tidy
from gpt.lr.lessons.words import Language, paragraphs, pick
from gpt.schedule import Plan, walk

# Section 17.6.3.
PEAK, FLOOR, START_FACTOR = 3e-4, 1e-5, 0.1
WARMUP_STEPS, TOTAL_STEPS = 1000, 100_000
FLOORS: dict[str, float] = {"warmup_cosine": 0.1, "cosine_restarts": 0.1}


@dataclass(frozen=True)
class Schedules:
    """Rates as shares of the peak by schedule; and the chapter's code, step by step.

    `shapes` are torch's rates, `gap` their largest distance from the closed form. `written` are the
    rates of the chapter's code, also past the end; `corrected` those with T_max as it should be.
    """

    shapes: dict[str, tuple[float, ...]]
    gap: float
    total_steps: int
    warmup_steps: int
    written: tuple[float, ...]
    corrected: tuple[float, ...]

    @property
    def lowest_step(self) -> int:
        """Where the chapter's code, run on, has its lowest rate after the warmup."""
        steps = range(self.warmup_steps, len(self.written))
        return min(steps, key=lambda step: self.written[step])

    @property
    def last_written(self) -> float:
        """The rate of the last step that the chapter's code was meant for."""
        return self.written[self.total_steps - 1]


def measure(
    total_steps: int = TOTAL_STEPS, warmup_steps: int = WARMUP_STEPS, shape_steps: int = 1000
) -> Schedules:
    """Walks every schedule with torch's own schedulers."""
    shapes, gap = {}, 0.0
    for name in get_args(ScheduleName):
        plan = shape_plan(name, shape_steps)
        rates = [rate for (rate,) in walk(plan, [1.0])]
        gap = max(gap, *(abs(rate - plan.factor(step)) for step, rate in enumerate(rates)))
        shapes[name] = tuple(rates)
    full_turn = warmup_steps + 2 * total_steps
    return Schedules(
        shapes=shapes,
        gap=gap,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        written=chapter_rates(warmup_steps, total_steps, full_turn + 1),
        corrected=chapter_rates(warmup_steps, total_steps - warmup_steps - 1, total_steps),
    )


def shape_plan(name: ScheduleName, total_steps: int) -> Plan:
    """A plan whose shape is easy to see: a tenth of warmup, a fifth of tail."""
    return Plan(
        name=name,
        total_steps=total_steps,
        warmup_steps=total_steps // 10,
        start_factor=START_FACTOR,
        floor_ratio=FLOOR / PEAK if name == "chapter" else FLOORS.get(name, 0.0),
        power=2.0,
    )


def chapter_rates(warmup_steps: int, t_max: int, n_steps: int) -> tuple[float, ...]:
    """What section 17.6.3's code gives at each step, with this `T_max`."""
    optimizer = torch.optim.AdamW([torch.zeros((), requires_grad=True)], lr=PEAK)
    warmup = LinearLR(optimizer, start_factor=START_FACTOR, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, T_max=t_max, eta_min=FLOOR)
    scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
    optimizer.step()  # torch warns if the schedule moves before the first update
    rates = []
    for _ in range(n_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    return tuple(rates)


def last_rate(total_steps: int) -> float:
    """The last rate of a run of this length under the chapter's code, in closed form."""
    plan = Plan("chapter", total_steps, WARMUP_STEPS, START_FACTOR, FLOOR / PEAK)
    return plan.rate(total_steps - 1, PEAK)


def explain(result: Schedules, language: Language) -> list[str]:
    """The numbers in words."""
    total, last = result.total_steps, result.last_written
    lasts = [last_rate(steps) for steps in (10_000, 2_000)]
    turn = result.warmup_steps + 2 * total
    names = ", ".join(result.shapes)
    return paragraphs(
        language,
        (
            f"{len(result.shapes)} schedules ({names}), walked by torch's SequentialLR and "
            f"compared with a closed form at every step: largest difference {result.gap:.0e} of "
            "the peak.",
            f"{len(result.shapes)} 种调度({names}),用 torch 的 SequentialLR 逐步走完,每一步都与闭式"
            f"公式比较:最大差别是峰值的 {result.gap:.0e}。",
        ),
        (
            f"17.6.3 as written (T_max = {total:,}, warmup {result.warmup_steps:,} besides): the "
            f"last step of {total:,} has {last:.4e}, not the floor {FLOOR:.0e}: the cosine reaches "
            f"that at step {result.lowest_step:,}, after the run. T_max should be total - warmup - "
            f"1 = {total - result.warmup_steps - 1:,}: then the last step has "
            f"{result.corrected[-1]:.4e}.",
            f"按 17.6.3 原样(T_max = {total:,},另有 warmup {result.warmup_steps:,}):{total:,} 步中"
            f"的最后一步是 {last:.4e},不是下限 {FLOOR:.0e}:余弦到第 {result.lowest_step:,} 步才到下"
            "限,那时训练已结束。T_max 应为 总步数 - warmup - 1 = "
            f"{total - result.warmup_steps - 1:,}:这样最后一步是 {result.corrected[-1]:.4e}。",
        ),
        (
            f"That is {last / FLOOR - 1:.1%} above the floor here; in a short run it is a lot: "
            f"with the same code 10,000 steps end at {lasts[0]:.2e}, and 2,000 at {lasts[1]:.2e}. "
            f"And a run that goes on climbs again: at step {turn:,} the rate is "
            f"{result.written[turn]:.2e}, the peak. The schedule `chapter` is exactly this; "
            "`warmup_cosine` is the corrected one.",
            f"这里只比下限高 {last / FLOOR - 1:.1%};训练短时就很多:同样的代码,10,000 步结束于 "
            f"{lasts[0]:.2e},2,000 步结束于 {lasts[1]:.2e}。继续训练下去,学习率又会上升:第 "
            f"{turn:,} 步是 {result.written[turn]:.2e},即峰值。调度 `chapter` 与原文完全一致;"
            "`warmup_cosine` 是改正后的。",
        ),
    )


def draw(result: Schedules, language: Language) -> Figure:
    """Nine small pictures; the chapter's last steps; and what follows them."""
    figure = new_figure(13, 6)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.6, 1])[0]
    grid = left.subplots(3, 3, sharex=True, sharey=True)
    for axes, (name, rates) in zip(grid.flat, result.shapes.items(), strict=True):
        axes.plot(rates, color=VERMILION if name == "chapter" else BLUE, linewidth=1.8)
        axes.fill_between(
            range(len(rates)), rates, color=VERMILION if name == "chapter" else BLUE, alpha=0.08
        )
        axes.set_ylim(0, 1.08)
        tidy(axes, title=name)
    left.supxlabel(pick(language, "optimizer step", "优化器步数"), fontsize=9.5)
    left.supylabel(pick(language, "share of the peak rate", "占峰值的比例"), fontsize=9.5)
    upper, lower = right.subplots(2, 1)
    _draw_end(upper, result, language)
    every = max(1, len(result.written) // 2000)
    steps = range(0, len(result.written), every)
    lower.plot(steps, [result.written[step] for step in steps], color=VERMILION, linewidth=1.8)
    lower.axvline(result.total_steps, color=GREY, linewidth=0.9, linestyle=":")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    lower.xaxis.set_major_formatter("{x:,.0f}")
    lower.xaxis.set_major_locator(MaxNLocator(4))
    tidy(
        lower,
        title=pick(language, "17.6.3, run on past its end", "17.6.3,训练继续下去"),
        x=pick(language, "optimizer step", "优化器步数"),
        y=pick(language, "learning rate", "学习率"),
    )
    return figure


def _draw_end(axes: Axes, result: Schedules, language: Language) -> None:
    total, reach = result.total_steps, 3 * result.warmup_steps // 2
    first = max(result.warmup_steps, total - 2 * reach)
    after = range(first, min(len(result.written), total + reach))
    shown = slice(after.start, after.stop)
    written = pick(language, f"as written: T_max = {total:,}", f"原样:T_max = {total:,}")
    t_max = total - result.warmup_steps - 1
    corrected = pick(language, f"corrected: T_max = {t_max:,}", f"改正:T_max = {t_max:,}")
    axes.plot(after, result.written[shown], color=VERMILION, linewidth=1.8, label=written)
    before = range(first, total)
    axes.plot(before, result.corrected[first:], color=GREEN, linewidth=1.8, label=corrected)
    axes.axvline(total, color=GREY, linewidth=0.9, linestyle=":")
    axes.axhline(FLOOR, color=GREY, linewidth=0.9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    tidy(
        axes,
        title=pick(language, "17.6.3: the last steps", "17.6.3:最后几步"),
        x=pick(language, "optimizer step", "优化器步数"),
        y=pick(language, "learning rate", "学习率"),
    )
    legend(axes, loc="upper right")
