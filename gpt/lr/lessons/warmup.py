"""Section 17.6.4: why warmup helps, measured: the same GPT with and without, over a few rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from gpt.config import OptimizerConfig, ScheduleConfig
from gpt.lr.lessons.picture import (
    BLUE,
    GREY,
    VERMILION,
    legend,
    new_figure,
    rate_ticks,
    smoothed,
    tidy,
)
from gpt.lr.lessons.side_by_side import run_all
from gpt.lr.lessons.tiny import GPT2_STYLE, Run, tiny_config
from gpt.lr.lessons.words import Language, paragraphs, pick

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
WARMUP = 0.25  # of the steps: a short run needs a large share for as many steps
N_LAYER = 3


@dataclass(frozen=True)
class Warmup:
    """Runs by rate, one for each seed, without a warmup and with one."""

    n_steps: int
    warmup_steps: int
    without: dict[float, tuple[Run, ...]]
    warmed: dict[float, tuple[Run, ...]]

    def loss(self, warmed: bool, rate: float) -> float:
        """Mean validation loss over the seeds."""
        return fmean(run.val_loss for run in (self.warmed if warmed else self.without)[rate])

    def best(self, warmed: bool) -> float:
        """The rate with the lowest mean loss."""
        return min(self.without, key=lambda rate: self.loss(warmed, rate))


def measure(
    n_steps: int = 120, rates: Sequence[float] = RATES, seeds: Sequence[int] = (1, 2)
) -> Warmup:
    """Trains at each rate with each seed, twice; both fall in a line to 0 at the end."""
    cases = [(share, rate, seed) for share in (0.0, WARMUP) for rate in rates for seed in seeds]
    configs = [
        tiny_config(
            OptimizerConfig(name="adamw", lr=rate, betas=(0.9, 0.999), weight_decay=0.0),
            n_steps,
            schedule=ScheduleConfig(name="linear", warmup_fraction=share),
            seed=seed,
            model=GPT2_STYLE.model_copy(update={"n_layer": N_LAYER}),
        )
        for share, rate, seed in cases
    ]
    found: dict[float, dict[float, tuple[Run, ...]]] = {0.0: {}, WARMUP: {}}
    for (share, rate, _), run in zip(cases, run_all(configs, "warmup"), strict=True):
        found[share][rate] = (*found[share].get(rate, ()), run)
    return Warmup(n_steps, round(WARMUP * n_steps), found[0.0], found[WARMUP])


def explain(result: Warmup, language: Language) -> list[str]:
    """The numbers in words."""
    without, warmed = result.best(False), result.best(True)
    losses = result.loss(False, without), result.loss(True, warmed)
    rows = "; ".join(
        f"{rate:g}: {result.loss(False, rate):.3f} / {result.loss(True, rate):.3f}"
        for rate in result.without
    )
    n_seeds = len(result.without[without])
    if warmed > without:
        times = warmed / without
        verdict = (
            f"With the warmup the best rate is {times:.0f} times as high",
            f"有 warmup 时,最佳学习率是原来的 {times:.0f} 倍",
        )
    else:
        verdict = (
            "On this machine the best rate is not higher with the warmup",
            "这一次,有 warmup 的最佳学习率并不更高",
        )
    high = max(result.without)
    gap = result.loss(False, high) - result.loss(True, high)
    return paragraphs(
        language,
        (
            f"A GPT of {N_LAYER} layers, AdamW (betas 0.9, 0.999), {result.n_steps} steps, "
            f"{n_seeds} seeds; without a warmup, and with one of {result.warmup_steps} steps. Mean "
            f"validation loss by peak rate, without / with: {rows}.",
            f"{N_LAYER} 层的 GPT,AdamW(betas 0.9, 0.999),{result.n_steps} 步,{n_seeds} 个种子;不带 "
            f"warmup,以及带 {result.warmup_steps} 步 warmup。各最大学习率下的平均验证损失,不带 / "
            f"带:{rows}。",
        ),
        (
            f"{verdict[0]} ({warmed:g} against {without:g}), and its loss is {losses[1]:.3f} "
            f"against {losses[0]:.3f}; at {high:g} the difference is {gap:+.3f}. The first Adam "
            "steps are about lr for every weight (lesson one-step), before the averages know "
            "anything: a run that takes them at the full rate lands where the loss falls slowly, "
            "and stays there.",
            f"{verdict[1]}({warmed:g} 对 {without:g}),损失 {losses[1]:.3f} 对 {losses[0]:.3f};在 "
            f"{high:g} 处相差 {gap:+.3f}。Adam 的头几步对每个权重都约为 lr(见 one-step 一课),而这时"
            "平均值还什么都不知道:一上来就用全速,会落到损失下降缓慢的地方,并留在那里。",
        ),
        (
            "So 17.6.4 is right about the large rate; the warmup's worth is that it lets the "
            "network bear a higher one. At low rates it brings nothing.",
            "所以 17.6.4 关于大学习率的说法是对的;warmup 的价值在于让网络承受更高的学习率。学习率"
            "低时,它没有好处。",
        ),
    )


def draw(result: Warmup, language: Language) -> Figure:
    """The loss by rate, with and without; the training curves at the highest rate but one."""
    figure = new_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    rates = list(result.without)
    shown = rates[max(0, len(rates) - 2)]
    names = {
        False: pick(language, "without warmup", "不带 warmup"),
        True: pick(language, "with warmup", "带 warmup"),
    }
    for warmed, color in ((False, VERMILION), (True, BLUE)):
        runs = result.warmed if warmed else result.without
        means = [result.loss(warmed, rate) for rate in rates]
        left.plot(rates, means, "o-", color=color, linewidth=1.8, markersize=5, label=names[warmed])
        for rate in rates:
            each = [run.val_loss for run in runs[rate] if math.isfinite(run.val_loss)]
            left.plot([rate] * len(each), each, "_", color=color, markersize=9, alpha=0.6)
        best = result.best(warmed)
        left.plot(best, result.loss(warmed, best), "*", color=color, markersize=15)
        for number, run in enumerate(runs[shown]):
            steps = range(1, len(run.losses) + 1)
            label = names[warmed] if number == 0 else None
            right.plot(steps, smoothed(run.losses), color=color, linewidth=1.6, label=label)
    rate_ticks(left, rates)
    right.axvline(result.warmup_steps, color=GREY, linewidth=0.8, linestyle=":")
    tidy(
        left,
        title=pick(language, "loss after the run, by peak rate", "训练后的损失"),
        x=pick(language, "peak learning rate", "最大学习率"),
        y=pick(language, "validation loss", "验证损失"),
    )
    tidy(
        right,
        title=pick(language, f"the runs at {shown:g}, each seed", f"学习率 {shown:g},每个种子"),
        x=pick(language, "optimizer step", "优化器步数"),
        y=pick(language, "training loss", "训练损失"),
    )
    legend(left, loc="best")
    legend(right, loc="upper right")
    return figure
