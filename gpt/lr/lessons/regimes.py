"""Section 17.2: too small, right, too large; on a quadratic with its exact limit, and a GPT."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt.config import OptimizerConfig
from gpt.lr.lessons.picture import (
    BLUE,
    GREEN,
    GREY,
    INK,
    VERMILION,
    legend,
    new_figure,
    smoothed,
    tidy,
)
from gpt.lr.lessons.side_by_side import run_all
from gpt.lr.lessons.tiny import Run, open_text, tiny_config
from gpt.lr.lessons.words import Language, paragraphs, pick

CURVATURE = 2.0  # of the loss w²
START = -1.0
SMALL, RIGHT, LARGE = 0.01, 0.35, 1.03
CURVATURES = (0.5, 2.0, 8.0)
GPT_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
AS_GOOD = 1.02  # a loss at most this many times the best counts as right


@dataclass(frozen=True)
class Regimes:
    """Paths on the quadratic by rate, the measured limit by curvature, and the GPT's runs."""

    paths: dict[float, tuple[float, ...]]
    limits: dict[float, float]
    runs: dict[float, Run]
    chance: float

    @property
    def best(self) -> float:
        """The rate with the lowest validation loss."""
        return min(self.runs, key=lambda rate: self.runs[rate].val_loss)


def measure(
    n_steps: int = 120, rates: Sequence[float] = GPT_RATES, path_steps: int = 14
) -> Regimes:
    """Descends the quadratic, looks for its limit by trial, and trains a tiny GPT at each rate."""
    configs = [
        tiny_config(OptimizerConfig(name="adamw", lr=rate, weight_decay=0.0), n_steps)
        for rate in rates
    ]
    runs = run_all(configs, "regimes")
    return Regimes(
        paths={rate: descend(rate, CURVATURE, path_steps) for rate in (SMALL, RIGHT, LARGE)},
        limits={curvature: measured_limit(curvature) for curvature in CURVATURES},
        runs=dict(zip(rates, runs, strict=True)),
        chance=math.log(open_text().tokenizer.vocab_size),
    )


def descend(rate: float, curvature: float, n_steps: int) -> tuple[float, ...]:
    """The weight before and after each step of `torch.optim.SGD` on curvature · w² / 2."""
    weight = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=rate)
    path = [weight.item()]
    for _ in range(n_steps):
        optimizer.zero_grad()
        (curvature * weight**2 / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        path.append(weight.item())
    return tuple(path)


def measured_limit(curvature: float, n_halvings: int = 24) -> float:
    """The rate above which steps lead away from the minimum, found by trial.

    In theory 2 / curvature: a step multiplies the weight by 1 - rate · curvature.
    """
    low, high = 0.0, 100.0 / curvature
    for _ in range(n_halvings):
        middle = (low + high) / 2
        if abs(descend(middle, curvature, 4)[-1]) < abs(START):
            low = middle
        else:
            high = middle
    return low


def explain(result: Regimes, language: Language) -> list[str]:
    """The numbers in words."""
    ends = {rate: path[-1] for rate, path in result.paths.items()}
    n_path = len(result.paths[RIGHT]) - 1
    found = ", ".join(f"{2 / c:g}: {limit:.5f}" for c, limit in result.limits.items())
    best, runs = result.best, result.runs
    low, high = min(runs), max(runs)
    n_steps = len(runs[best].losses)
    values = ", ".join(f"{rate:g}: {_shown(run.val_loss)}" for rate, run in runs.items())
    return paragraphs(
        language,
        (
            f"Loss w², start {START:g}, {n_path} steps. lr {SMALL:g}: {ends[SMALL]:.3f}, too "
            f"small. lr {RIGHT:g}: {ends[RIGHT]:.1e}, right. lr {LARGE:g}: {ends[LARGE]:.2f}, too "
            "large: each step lands beyond the minimum, and further away.",
            f"损失 w²,起点 {START:g},{n_path} 步。lr {SMALL:g}:{ends[SMALL]:.3f},太小。lr "
            f"{RIGHT:g}:{ends[RIGHT]:.1e},合适。lr {LARGE:g}:{ends[LARGE]:.2f},太大:每一步都跨过最"
            "低点,而且越来越远。",
        ),
        (
            "A step multiplies w by 1 - lr·λ, where λ is the curvature: stable below 2/λ. Limit "
            f"by theory, and as found by trial: {found}.",
            "每一步把 w 乘以 1 - lr·λ,λ 是曲率:lr 小于 2/λ 才稳定。理论极限与试出来的极限:"
            f"{found}。",
        ),
        (
            f"A tiny GPT, AdamW without decay, {n_steps} steps; validation loss by rate: {values}. "
            f"Best is {best:g}. {low:g} has come from ln V = {result.chance:.2f} only to "
            f"{_shown(runs[low].val_loss)}; {high:g} is "
            f"{_compared(runs[high].val_loss, result.chance, 'en')}.",
            f"小 GPT,AdamW 无衰减,{n_steps} 步;各学习率的验证损失:{values}。最好的是 {best:g}。"
            f"{low:g} 只从 ln V = {result.chance:.2f} 降到 {_shown(runs[low].val_loss)};{high:g} "
            f"{_compared(runs[high].val_loss, result.chance, 'zh')}。",
        ),
    )


def _shown(loss: float) -> str:
    return f"{loss:.2f}" if math.isfinite(loss) else "NaN"


def _compared(loss: float, chance: float, language: Language) -> str:
    if loss > chance:
        return pick(language, "worse than knowing nothing", "比什么都不知道还差")
    return pick(language, "not yet worse than knowing nothing", "还没有比什么都不知道更差")


def draw(result: Regimes, language: Language) -> Figure:
    """Above, the three paths on the quadratic; below, the GPT's curves and its loss by rate."""
    figure = new_figure(10.5, 7)
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    titles = {
        SMALL: pick(language, "too small", "太小"),
        RIGHT: pick(language, "right", "合适"),
        LARGE: pick(language, "too large", "太大"),
    }
    colors = {SMALL: GREEN, RIGHT: BLUE, LARGE: VERMILION}
    for axes, rate in zip(upper.subplots(1, 3, sharey=True), result.paths, strict=True):
        _draw_path(axes, result.paths[rate], colors[rate])
        tidy(axes, title=f"{titles[rate]}: lr {rate:g}", x="w", grid=False)
    upper.axes[0].set_ylabel(pick(language, "loss w²", "损失 w²"), fontsize=9.5)
    left, right = lower.subplots(1, 2)
    shown = _three_rates(result)
    for rate, key in zip(shown, (SMALL, RIGHT, LARGE), strict=True):
        losses = result.runs[rate].losses
        steps = range(1, len(losses) + 1)
        label = f"{titles[key]}: lr {rate:g}"
        left.plot(steps, smoothed(losses), color=colors[key], linewidth=1.8, label=label)
    left.axhline(result.chance, color=GREY, linewidth=0.9, linestyle=":")
    left.text(10, result.chance * 1.05, "ln V", fontsize=8.5, color=GREY)
    left.set_yscale("log")
    left.set_ylim(top=min(200, 1.2 * max(left.get_ylim()[1], 2 * result.chance)))
    tidy(
        left,
        title=pick(language, "the same three on a tiny GPT", "同样三种情况,小 GPT"),
        x=pick(language, "optimizer step", "优化器步数"),
        y=pick(language, "training loss", "训练损失"),
    )
    legend(left, loc="center right")
    _draw_by_rate(right, result, language)
    return figure


def _draw_path(axes: Axes, path: Sequence[float], color: str) -> None:
    reach = 1.65
    grid = torch.linspace(-reach, reach, 200)
    axes.plot(grid, grid**2, color=GREY, linewidth=1.6)
    axes.plot(path, [w**2 for w in path], "o-", color=color, markersize=5, linewidth=1, alpha=0.85)
    axes.plot(path[0], path[0] ** 2, "o", color=INK, markersize=7)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-0.08, reach**2)


def _three_rates(result: Regimes) -> tuple[float, float, float]:
    """The best rate, the one nearest to a hundredth of it, and the highest."""
    below = min(result.runs, key=lambda rate: abs(math.log(rate * 100 / result.best)))
    return below, result.best, max(result.runs)


def _draw_by_rate(axes: Axes, result: Regimes, language: Language) -> None:
    top = 1.35 * result.chance
    rates = list(result.runs)
    losses = [min(run.val_loss, top) for run in result.runs.values()]
    axes.plot(rates, losses, color=GREY, linewidth=1.4, zorder=1)
    lowest = result.runs[result.best].val_loss
    for rate, loss in zip(rates, losses, strict=True):
        beside = GREEN if rate < result.best else VERMILION
        color = BLUE if loss <= AS_GOOD * lowest else beside
        marker, size = ("*", 15) if rate == result.best else ("o", 6)
        axes.plot(rate, loss, marker, color=color, markersize=size, clip_on=False)
    axes.axhline(result.chance, color=GREY, linewidth=0.9, linestyle=":")
    axes.text(rates[0], result.chance * 1.02, "ln V", fontsize=8.5, color=GREY)
    for rate, run in result.runs.items():
        if run.val_loss > top:
            axes.annotate(
                _shown(run.val_loss),
                (rate, top),
                (0, -12),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color=VERMILION,
            )
    axes.set_xscale("log")
    tidy(
        axes,
        title=pick(language, "validation loss after the run, by rate", "训练后的验证损失"),
        x=pick(language, "learning rate (AdamW)", "学习率(AdamW)"),
        y=pick(language, "validation loss", "验证损失"),
    )
