"""Section 17.5: SGD, Adam and AdamW on the same ravine and on the same tiny GPT, each tuned."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gpt.config import OptimizerConfig, ScheduleConfig
from gpt.lr.lessons.picture import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    VERMILION,
    legend,
    new_figure,
    tidy,
)
from gpt.lr.lessons.side_by_side import run_all
from gpt.lr.lessons.tiny import Run, tiny_config
from gpt.lr.lessons.words import Language, paragraphs, pick

CONDITION = 100.0  # curvature across the ravine over that along it
ANGLE = math.pi / 6  # the ravine does not run along an axis, which would favour Adam
START = (-2.0, 0.4)  # along and across
REACHED = 1e-3  # of the first loss
RUN_AWAY = 1e3  # a weight this large is lost
RAVINE_RATES = tuple(2.0 ** (power / 2) for power in range(-22, 9))
RAVINE: dict[str, Callable[[list[Tensor], float], Optimizer]] = {
    "SGD": lambda weights, lr: SGD(weights, lr=lr, fused=True),
    "SGD + momentum": lambda weights, lr: SGD(weights, lr=lr, momentum=0.9, fused=True),
    "Adam": lambda weights, lr: Adam(weights, lr=lr, fused=True),
}
SGD_RATES = (0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DECAY = 0.1
GPT: dict[str, tuple[OptimizerConfig, tuple[float, ...]]] = {
    "SGD": (OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0), SGD_RATES),
    "SGD + momentum": (
        OptimizerConfig(name="sgd", momentum=0.9, weight_decay=0.0),
        SGD_RATES,
    ),
    "Adam": (OptimizerConfig(name="adam", weight_decay=DECAY), ADAM_RATES),
    "AdamW": (OptimizerConfig(name="adamw", weight_decay=DECAY), ADAM_RATES),
}
COLORS = {"SGD": VERMILION, "SGD + momentum": ORANGE, "Adam": GREEN, "AdamW": BLUE}


@dataclass(frozen=True, eq=False)
class Descent:
    """One optimizer on the ravine, over rates: steps until the loss stays below `REACHED`.

    Rates that do not get there are missing. `path` is (steps + 1, 2), at the quickest rate.
    """

    steps: dict[float, int]
    path: Tensor
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        """The quickest rate."""
        return min(self.steps, key=lambda rate: self.steps[rate])

    @property
    def width_text(self) -> str:
        """The width in words; open where the highest rate that was tried gets there too."""
        sign = "≥" if max(self.steps) == RAVINE_RATES[-1] else ""
        return f"{sign}×{self.width:.{1 if self.width < 10 else 0}f}"

    @property
    def width(self) -> float:
        """The highest rate that gets there over the lowest."""
        return max(self.steps) / min(self.steps)


@dataclass(frozen=True, eq=False)
class Optimizers:
    """By name of the optimizer: the ravine, and the GPT's runs by rate."""

    ravine: dict[str, Descent]
    adamw_gap: float
    runs: dict[str, dict[float, Run]]

    def best(self, name: str) -> float:
        """The rate with the GPT's lowest validation loss."""
        return min(self.runs[name], key=lambda rate: self.runs[name][rate].val_loss)

    def loss(self, name: str) -> float:
        """The GPT's validation loss at the best rate."""
        return self.runs[name][self.best(name)].val_loss


def measure(
    n_steps: int = 120, ravine_steps: int = 300, n_rates: int = len(ADAM_RATES)
) -> Optimizers:
    """Tries each optimizer at many rates, on the ravine and on the GPT."""
    schedule = ScheduleConfig(name="linear", warmup_fraction=0.1)
    cases = [(name, rate) for name, (_, rates) in GPT.items() for rate in rates[:n_rates]]
    configs = [
        tiny_config(GPT[name][0].model_copy(update={"lr": rate}), n_steps, schedule=schedule)
        for name, rate in cases
    ]
    runs: dict[str, dict[float, Run]] = {name: {} for name in GPT}
    for (name, rate), run in zip(cases, run_all(configs, "optimizers"), strict=True):
        runs[name][rate] = run
    ravine = {name: descend_ravine(build, ravine_steps) for name, build in RAVINE.items()}
    without_decay, _ = ravine_path(
        lambda weights, lr: AdamW(weights, lr=lr, weight_decay=0.0, fused=True),
        ravine["Adam"].best,
        ravine_steps,
    )
    gap = float((without_decay - ravine["Adam"].path).abs().max())
    return Optimizers(ravine, gap, runs)


def ravine_axes() -> Tensor:
    """Columns: the direction along the ravine, and the one across, (2, 2)."""
    cosine, sine = math.cos(ANGLE), math.sin(ANGLE)
    return torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)


def ravine_loss(weights: Tensor) -> Tensor:
    """(along² + CONDITION · across²) / 2 of weights (..., 2)."""
    turned = weights @ ravine_axes()
    return (turned[..., 0] ** 2 + CONDITION * turned[..., 1] ** 2) / 2


def ravine_path(
    build: Callable[[list[Tensor], float], Optimizer], rate: float, n_steps: int
) -> tuple[Tensor, tuple[float, ...]]:
    """The weights, (steps + 1, 2), and the losses at them; cut short once they run away."""
    axes = ravine_axes()
    curvature = axes @ torch.diag(torch.tensor([1.0, CONDITION], dtype=torch.float64)) @ axes.T
    weights = (axes @ torch.tensor(START, dtype=torch.float64)).requires_grad_()
    optimizer = build([weights], rate)
    path = [weights.detach().clone()]
    while len(path) <= n_steps and float(path[-1].abs().max()) < RUN_AWAY:
        weights.grad = curvature @ path[-1]
        optimizer.step()
        path.append(weights.detach().clone())
    points = torch.stack(path)
    return points, tuple(ravine_loss(points).tolist())


def descend_ravine(build: Callable[[list[Tensor], float], Optimizer], n_steps: int) -> Descent:
    """Tries all rates."""
    steps, kept = {}, {}
    for rate in RAVINE_RATES:
        path, losses = ravine_path(build, rate, n_steps)
        last = max(step for step, loss in enumerate(losses) if not loss < REACHED * losses[0])
        if last < n_steps and len(losses) == n_steps + 1:
            steps[rate], kept[rate] = last + 1, (path, losses)
    best = min(steps, key=lambda rate: steps[rate])
    return Descent(steps, *kept[best])


def explain(result: Optimizers, language: Language) -> list[str]:
    """The numbers in words."""
    steps = {name: descent.steps[descent.best] for name, descent in result.ravine.items()}
    ravine = ", ".join(
        f"{name} {steps[name]} (lr {descent.best:.2g}, {descent.width_text})"
        for name, descent in result.ravine.items()
    )
    tuned = ", ".join(
        f"{name} {result.loss(name):.3f} (lr {result.best(name):g})" for name in result.runs
    )
    n_steps = len(result.runs["AdamW"][result.best("AdamW")].losses)
    better = result.loss("AdamW") < result.loss("Adam")
    same = result.adamw_gap == 0
    return paragraphs(
        language,
        (
            f"A ravine {CONDITION:g} times steeper across than along. Steps to {REACHED:g} of the "
            f"first loss at the best of {len(RAVINE_RATES)} rates, and in brackets that rate and "
            f"how wide the range is that get there: {ravine}. Adam is not so much faster as more "
            "forgiving.",
            f"一条山谷,横向比纵向陡 {CONDITION:g} 倍。在 {len(RAVINE_RATES)} 个学习率中最好的一个"
            f"下,损失降到开始的 {REACHED:g} 所需步数,括号里是该学习率和可用范围的宽度:{ravine}。"
            "Adam 不是快很多,而是宽容得多。",
        ),
        (
            "AdamW without decay takes "
            + ("exactly Adam's path" if same else f"Adam's path within {result.adamw_gap:.0e}")
            + ": the two differ in the decay alone (see the lesson decay).",
            "不带衰减的 AdamW 走的"
            + ("正是 Adam 的路" if same else f"与 Adam 的路相差不到 {result.adamw_gap:.0e}")
            + ":两者只差在衰减上(见 decay 一课)。",
        ),
        (
            f"The tiny GPT, {n_steps} steps, best validation loss of {len(ADAM_RATES)} rates each: "
            f"{tuned}. SGD runs without decay, Adam and AdamW with {DECAY:g}: coupled in Adam, "
            f"decoupled in AdamW, and AdamW is {'better' if better else 'not better'} here. Their "
            "rates are not exchangeable: SGD's best is "
            f"{result.best('SGD') / result.best('AdamW'):.0f} times AdamW's.",
            f"小 GPT,{n_steps} 步,每种优化器 {len(ADAM_RATES)} 个学习率中最好的验证损失:{tuned}。"
            f"SGD 不带衰减,Adam 和 AdamW 的衰减是 {DECAY:g}:Adam 是耦合的,AdamW 是解耦的,这里 "
            f"AdamW {'更好' if better else '没有更好'}。学习率不能互换:SGD 的最佳值是 AdamW 的 "
            f"{result.best('SGD') / result.best('AdamW'):.0f} 倍。",
        ),
    )


def draw(result: Optimizers, language: Language) -> Figure:
    """The paths in the ravine; how many rates work there; the GPT's loss by rate."""
    figure = new_figure(13, 4.3)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
    _draw_ravine(left, result, language)
    for name, descent in result.ravine.items():
        middle.plot(
            list(descent.steps),
            list(descent.steps.values()),
            "o-",
            color=COLORS[name],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    middle.set_xscale("log")
    middle.set_ylim(bottom=0)
    middle.set_xlim(RAVINE_RATES[0], RAVINE_RATES[-1])
    tidy(
        middle,
        title=pick(language, "the ravine: steps needed, by rate", "山谷:各学习率所需步数"),
        x=pick(language, "learning rate", "学习率"),
        y=pick(language, "steps to 1/1000 of the first loss", "降到初始损失 1/1000 的步数"),
    )
    for offset, (name, runs) in enumerate(result.runs.items()):
        alive = {rate: run.val_loss for rate, run in runs.items() if run.val_loss < run.losses[0]}
        right.plot(
            list(alive),
            list(alive.values()),
            "o-",
            color=COLORS[name],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
        lost = [rate * 1.06**offset for rate in runs if rate not in alive]
        right.plot(
            lost,
            [0.97] * len(lost),
            "x",
            color=COLORS[name],
            markersize=8,
            transform=right.get_xaxis_transform(),
        )
    right.set_xscale("log")
    tidy(
        right,
        title=pick(
            language, "tiny GPT: loss by rate (×: diverged)", "小 GPT:各学习率的损失(×:发散)"
        ),
        x=pick(language, "peak learning rate", "最大学习率"),
        y=pick(language, "validation loss", "验证损失"),
    )
    legend(right, loc="best")
    return figure


def _draw_ravine(axes: Axes, result: Optimizers, language: Language) -> None:
    xs, ys = torch.linspace(-2.4, 0.5, 160), torch.linspace(-1.5, 0.6, 120)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1).double()
    levels = [0.05 * 2.2**power for power in range(9)]
    axes.contour(xs, ys, ravine_loss(grid), levels=levels, colors=FAINT, linewidths=1)
    for name, descent in result.ravine.items():
        shown = descent.path[: descent.steps[descent.best] + 1]
        axes.plot(
            shown[:, 0],
            shown[:, 1],
            "o-",
            color=COLORS[name],
            markersize=2.5,
            linewidth=1.2,
            alpha=0.9,
            label=f"{name}: {len(shown) - 1}",
        )
    axes.plot(0, 0, "*", color=INK, markersize=11, zorder=4)
    axes.set(xlim=(-2.4, 0.5), ylim=(-1.5, 0.6))
    tidy(
        axes,
        title=pick(language, "the ravine: paths at the best rates", "山谷:最佳学习率下的路径"),
        x=pick(language, "weight 1", "权重 1"),
        y=pick(language, "weight 2", "权重 2"),
        grid=False,
    )
    legend(axes, loc="lower right", title=pick(language, "steps needed", "所需步数"))
