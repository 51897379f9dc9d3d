"""Section 17.7.1: batch and rate; both rules where they can be derived, and what a GPT does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim import SGD, Adam

from gpt.config import OptimizerConfig, ScheduleConfig
from gpt.lr.lessons.picture import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SKY,
    VERMILION,
    legend,
    new_figure,
    rate_ticks,
    tidy,
)
from gpt.lr.lessons.side_by_side import run_all
from gpt.lr.lessons.tiny import Run, tiny_config
from gpt.lr.lessons.words import Language, paragraphs, pick

# A quadratic of eight curvatures; the gradient's noise has four hundred times their variance.
CURVATURES = torch.logspace(-2, 0, 8, dtype=torch.float64)
NOISE = 400.0
SAMPLES = 8192
BATCHES = (4, 16, 64, 256)
SGD_RATES = tuple(2.0 ** (power / 4) for power in range(-40, 4))
ADAM_RATES = tuple(2.0 ** (power / 2) for power in range(-15, -4))
GPT_BATCHES = (4, 32)
GPT_SEQUENCES = 1024
GPT_RATES = {
    "sgd": (0.04, 0.16, 0.32, 0.64, 1.28),
    "adam": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
}
NAMES = {"sgd": "SGD", "adam": "Adam"}
SAME_RATIO = 0.01  # rate over batch
FOLLOWS = 0.8  # an exponent from here on follows the linear rule
TOP_LOSS = 5.5  # not drawn above: about that of a model that knows nothing


@dataclass(frozen=True)
class Batch:
    """Losses after equally many samples. The quadratic's and the GPT's, by optimizer and batch.

    `losses[name][batch][rate]` is the quadratic's expected loss, `runs` the GPT's alike, one for
    each seed.
    """

    losses: dict[str, dict[int, dict[float, float]]]
    runs: dict[str, dict[int, dict[float, tuple[Run, ...]]]]

    def best(self, name: str, batch: int) -> float:
        """The quadratic's best rate, between the ones tried: the vertex of a parabola."""
        return vertex(self.losses[name][batch])

    def gpt_losses(self, name: str, batch: int) -> dict[float, float]:
        """The GPT's validation losses by rate, each the mean over the seeds."""
        return {
            rate: fmean(run.val_loss for run in runs)
            for rate, runs in self.runs[name][batch].items()
        }

    def gpt_best(self, name: str, batch: int) -> float:
        """The GPT's best rate, between the ones tried."""
        return vertex(self.gpt_losses(name, batch))

    def at_same_ratio(self, name: str, ratio: float) -> dict[float, float]:
        """The GPT's losses at the rates that are `ratio` times the batch, as far as tried."""
        return {
            rate: loss
            for size in self.runs[name]
            for rate, loss in self.gpt_losses(name, size).items()
            if math.isclose(rate, ratio * size)
        }

    def exponent(self, name: str) -> float:
        """The e of "rate ∝ batch^e" on the quadratic: 1 is linear, 1/2 the square root."""
        low, high = min(self.losses[name]), max(self.losses[name])
        return math.log(self.best(name, high) / self.best(name, low)) / math.log(high / low)

    def gpt_exponent(self, name: str) -> float:
        """The same of the GPT."""
        low, high = min(self.runs[name]), max(self.runs[name])
        ratio = self.gpt_best(name, high) / self.gpt_best(name, low)
        return math.log(ratio) / math.log(high / low)


def measure(
    samples: int = SAMPLES,
    n_copies: int = 64,
    sequences: int = GPT_SEQUENCES,
    gpt_batches: Sequence[int] = GPT_BATCHES,
    batches: Sequence[int] = BATCHES,
    seeds: Sequence[int] = (1, 2),
) -> Batch:
    """Finds the best rate at each batch size, on the quadratic and on a tiny GPT."""
    schedule = ScheduleConfig(name="linear", warmup_fraction=0.1)
    cases = [
        (name, batch, rate, seed)
        for name, rates in GPT_RATES.items()
        for batch in gpt_batches
        for rate in rates
        for seed in seeds
    ]
    configs = [
        tiny_config(
            OptimizerConfig.model_validate(
                {"name": name, "lr": rate, "momentum": 0.0, "weight_decay": 0.0}
            ),
            sequences // batch,
            batch_size=batch,
            schedule=schedule,
            seed=seed,
        )
        for name, batch, rate, seed in cases
    ]
    runs: dict[str, dict[int, dict[float, tuple[Run, ...]]]] = {
        name: {batch: {} for batch in gpt_batches} for name in GPT_RATES
    }
    for (name, batch, rate, _), run in zip(cases, run_all(configs, "batch"), strict=True):
        by_rate = runs[name][batch]
        by_rate[rate] = (*by_rate.get(rate, ()), run)
    losses = {
        "sgd": {batch: expected_losses(batch, samples) for batch in batches},
        "adam": {batch: simulated_losses("adam", batch, samples, n_copies) for batch in batches},
    }
    return Batch(losses, runs)


def expected_losses(batch: int, samples: int) -> dict[float, float]:
    """The quadratic's expected loss under SGD, by rate, after `samples` samples from weights of 1.

    A step is w <- (1 - lr·λ) w + lr·noise, so that E[w²] <- (1 - lr·λ)² E[w²] + lr²·variance/batch.
    While lr·λ is small, both what decays and what noise adds depend on lr / batch alone, over
    samples / batch steps: the linear rule, of Goyal et al. 2017 (arXiv:1706.02677), section 2.1.
    """
    n_steps, losses = samples // batch, {}
    for rate in SGD_RATES:
        kept = (1 - rate * CURVATURES) ** 2
        added = rate**2 * NOISE * CURVATURES / batch
        square = kept**n_steps + added * (1 - kept**n_steps) / (1 - kept)
        losses[rate] = float((CURVATURES * square).sum()) / 2
    return losses


def simulated_losses(
    name: str, batch: int, samples: int, n_copies: int, rates: Sequence[float] = ADAM_RATES
) -> dict[float, float]:
    """The same by torch's own optimizer, as the mean over `n_copies` copies with their own noise.

    Where noise is all of the gradient, Adam's steps are lr in size, whatever the batch. Their
    useful part is gradient / noise, which grows with √batch. Over samples / batch steps both the
    way and the variance from noise depend on lr / √batch alone: the square-root rule, of Malladi
    et al. 2022 (arXiv:2205.10287).
    """
    generator = torch.Generator().manual_seed(0)
    copies = [
        torch.ones(n_copies, len(CURVATURES), dtype=torch.float64, requires_grad=True)
        for _ in rates
    ]
    groups = [
        {"params": [weights], "lr": rate} for weights, rate in zip(copies, rates, strict=True)
    ]
    optimizer = Adam(groups, betas=(0.9, 0.95)) if name == "adam" else SGD(groups)
    deviation = (NOISE * CURVATURES / batch).sqrt()
    for _ in range(samples // batch):
        noise = deviation * torch.randn(
            n_copies, len(CURVATURES), generator=generator, dtype=torch.float64
        )
        for weights in copies:
            weights.grad = CURVATURES * weights.detach() + noise
        optimizer.step()
    squares = [weights.detach().square().mean(dim=0) for weights in copies]
    losses = [float((CURVATURES * square).sum()) / 2 for square in squares]
    return dict(zip(rates, losses, strict=True))


def vertex(losses: dict[float, float]) -> float:
    """Where the parabola in log rate through the best rate and its two neighbours is lowest.

    It is the best rate itself where that is the first or the last that was tried.
    """
    rates = sorted(rate for rate in losses if math.isfinite(losses[rate]))
    index = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < index < len(rates) - 1:
        return rates[index]
    around = rates[index - 1 : index + 2]
    bend, slope, _ = np.polyfit(np.log(around), [losses[rate] for rate in around], 2)
    return math.exp(-slope / (2 * bend)) if bend > 0 else rates[index]


def explain(result: Batch, language: Language) -> list[str]:
    """The numbers in words."""
    batches = list(result.losses["sgd"])
    best = {name: ", ".join(f"{result.best(name, size):.2g}" for size in batches) for name in NAMES}
    gpt_batches = list(result.runs["sgd"])
    n_seeds = len(next(iter(result.runs["sgd"][gpt_batches[0]].values())))
    gpt_best = {
        name: ", ".join(f"{result.gpt_best(name, size):.2g}" for size in gpt_batches)
        for name in NAMES
    }
    same = ", ".join(
        f"{rate:g}: {loss:.3f}" for rate, loss in result.at_same_ratio("sgd", SAME_RATIO).items()
    )
    exponents = {name: f"{result.exponent(name):.2f}" for name in NAMES}
    gpt_exponents = {name: f"{result.gpt_exponent(name):.2f}" for name in NAMES}
    return paragraphs(
        language,
        (
            "A quadratic whose gradient is mostly noise, always the same number of samples. Best "
            f"rate at batch {_listed(batches)}: SGD {best['sgd']}: rate ∝ batch^{exponents['sgd']},"
            f" the linear rule of 17.7.1. Adam {best['adam']}: rate ∝ batch^{exponents['adam']}, "
            "the square root. The chapter gives one rule for both; it is SGD's.",
            f"一个梯度几乎全是噪声的二次函数,样本总数始终相同。批量 {_listed(batches)} 时的最佳学习"
            f"率:SGD {best['sgd']},lr ∝ 批量^{exponents['sgd']},即 17.7.1 的线性规则。Adam "
            f"{best['adam']},lr ∝ 批量^{exponents['adam']},是平方根。书中的规则是 SGD 的。",
        ),
        (
            f"The tiny GPT, batch {_listed(gpt_batches)}, always the same text. Best rate with SGD:"
            f" {gpt_best['sgd']} (exponent {gpt_exponents['sgd']}); with Adam: {gpt_best['adam']} "
            f"({gpt_exponents['adam']}). Rough figures, from {n_seeds} seeds: the curves are flat "
            "around their minimum, and a young GPT's gradient is not all noise.",
            f"小 GPT,批量 {_listed(gpt_batches)},文本总量始终相同。SGD 的最佳学习率:"
            f"{gpt_best['sgd']}(指数 {gpt_exponents['sgd']});Adam:"
            f"{gpt_best['adam']}({gpt_exponents['adam']})。这是 {n_seeds} 个种子得出的粗略数字:曲线"
            "在最低点附近很平,而且刚开始训练的 GPT,梯度并不全是噪声。",
        ),
        (
            f"SGD's loss at rates of {SAME_RATIO:g} × batch, {same}: nearly the same while the "
            "rate is small, as the linear rule has it. "
            + (
                "But the best rate grows less than the rule says, with exponent "
                f"{gpt_exponents['sgd']}: curvature bounds it too (lesson regimes), whatever the "
                "batch. The rule tells how to keep what works; not how much a larger batch can "
                "bear."
                if result.gpt_exponent("sgd") < FOLLOWS
                else "And the best rate follows."
            ),
            f"SGD 在 lr = {SAME_RATIO:g} × 批量 时的损失,{same}:学习率小的时候几乎相同,正如线性规则"
            "所说。"
            + (
                f"但最佳学习率的增长比规则慢,指数 {gpt_exponents['sgd']}:它还受曲率限制(见 regimes "
                "一课),与批量无关。规则说的是怎样保持原有的效果,不是更大的批量能承受多少。"
                if result.gpt_exponent("sgd") < FOLLOWS
                else "最佳学习率也跟着变。"
            ),
        ),
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def draw(result: Batch, language: Language) -> Figure:
    """The quadratic's best rate by batch, with both rules; the GPT's loss by rate and batch."""
    figure = new_figure(13, 4.3)
    left, middle, right = figure.subplots(1, 3)
    for name, color, power, rule in (
        ("sgd", VERMILION, 1.0, pick(language, "linear", "线性")),
        ("adam", BLUE, 0.5, pick(language, "square root", "平方根")),
    ):
        batches = list(result.losses[name])
        best = [result.best(name, size) for size in batches]
        left.plot(batches, best, "o", color=color, markersize=7, label=NAMES[name])
        line = [best[0] * (size / batches[0]) ** power for size in batches]
        left.plot(batches, line, color=color, linewidth=1.2, linestyle="--", label=rule)
    left.set(xscale="log", yscale="log")
    left.set_xticks(batches, [str(size) for size in batches])
    left.minorticks_off()
    tidy(
        left,
        title=pick(language, "noisy quadratic: best rate", "带噪声的二次函数:最佳学习率"),
        x=pick(language, "batch", "批量"),
        y=pick(language, "best learning rate", "最佳学习率"),
    )
    legend(left, loc="upper left")
    _draw_gpt(middle, result, "sgd", language)
    _draw_gpt(right, result, "adam", language)
    return figure


def _draw_gpt(axes: Axes, result: Batch, name: str, language: Language) -> None:
    for size, color in zip(result.runs[name], (SKY, INK, GREEN, ORANGE), strict=False):
        losses = {r: v for r, v in result.gpt_losses(name, size).items() if v < TOP_LOSS}
        label = pick(language, f"batch {size}", f"批量 {size}")
        axes.plot(
            list(losses),
            list(losses.values()),
            "o-",
            color=color,
            markersize=4.5,
            linewidth=1.6,
            label=label,
        )
        axes.axvline(result.gpt_best(name, size), color=color, linewidth=1, linestyle=":")
    rate_ticks(axes, GPT_RATES[name])
    tidy(
        axes,
        title=pick(
            language,
            f"tiny GPT, {NAMES[name]}: loss by rate",
            f"小 GPT,{NAMES[name]}:各学习率的损失",
        ),
        x=pick(language, "peak learning rate (dotted: best)", "最大学习率(虚线:最佳)"),
        y=pick(language, "validation loss", "验证损失"),
    )
    legend(axes, loc="upper right")
