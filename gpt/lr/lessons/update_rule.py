"""Section 17.1: one weight, one step, by hand, by autograd and by torch's own optimizer."""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from gpt.lr.lessons.picture import BLUE, GREEN, GREY, INK, VERMILION, legend, new_figure, tidy
from gpt.lr.lessons.words import Language, paragraphs, pick

WEIGHT, GRADIENT, RATE = 0.90, -0.4, 0.1
# A loss whose slope at 0.90 is -0.4: (w - 1.3)^2 / 2.
BEST = WEIGHT - GRADIENT
RATES = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class UpdateRule:
    """The chapter's step computed three ways, and where further steps lead at three rates."""

    gradient: float
    by_hand: float
    by_autograd: float
    by_sgd: float
    paths: dict[float, tuple[float, ...]]


def loss_of(weight: torch.Tensor) -> torch.Tensor:
    """The lesson's loss."""
    return (weight - BEST) ** 2 / 2


def measure(n_steps: int = 40) -> UpdateRule:
    """Takes the chapter's step, and then more of them at each of its three rates."""
    weight = torch.tensor(WEIGHT, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(weight), weight)
    paths = {rate: descend(rate, n_steps) for rate in RATES}
    return UpdateRule(
        gradient=float(gradient),
        by_hand=WEIGHT - RATE * GRADIENT,
        by_autograd=(weight - RATE * gradient).item(),
        by_sgd=paths[RATE][1],
        paths=paths,
    )


def descend(rate: float, n_steps: int) -> tuple[float, ...]:
    """The weight before the first step and after each, under `torch.optim.SGD`."""
    weight = torch.tensor(WEIGHT, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=rate)
    path = [weight.item()]
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss_of(weight).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        path.append(weight.item())
    return tuple(path)


def explain(result: UpdateRule, language: Language) -> list[str]:
    """The numbers in words."""
    firsts = [f"lr {rate:g}: {path[1]:.4f}" for rate, path in result.paths.items()]
    lasts = [f"lr {rate:g}: {path[-1]:.3f}" for rate, path in result.paths.items()]
    n_steps = len(result.paths[RATE]) - 1
    return paragraphs(
        language,
        (
            f"The loss (w - {BEST:g})²/2 has the slope {result.gradient:.1f} at w = {WEIGHT:.2f}, "
            f"as in 17.1.2. New weight = {WEIGHT:.2f} - {RATE} x ({GRADIENT}) = "
            f"{result.by_hand:.2f} by hand, {result.by_autograd:.2f} by autograd, "
            f"{result.by_sgd:.2f} by torch.optim.SGD.",
            f"损失 (w - {BEST:g})²/2 在 w = {WEIGHT:.2f} 处的斜率是 {result.gradient:.1f},即 "
            f"17.1.2 的例子。新权重 = {WEIGHT:.2f} - {RATE} × ({GRADIENT}):手算 "
            f"{result.by_hand:.2f},autograd {result.by_autograd:.2f},torch.optim.SGD "
            f"{result.by_sgd:.2f}。",
        ),
        (
            "The gradient is negative: a larger weight means a smaller loss, so the weight grows. "
            f"The three rates of 17.1.3 after one step: {', '.join(firsts)}; after {n_steps} steps:"
            f" {', '.join(lasts)}; the minimum is at {BEST:g}.",
            "梯度为负:权重变大,损失变小,所以权重增加。17.1.3 的三个学习率走一步之后:"
            f"{','.join(firsts)};走 {n_steps} 步之后:{','.join(lasts)};最低点在 {BEST:g}。",
        ),
    )


def draw(result: UpdateRule, language: Language) -> Figure:
    """The first step on the loss curve; the weight over further steps."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    grid = torch.linspace(0.82, 1.45, 100, dtype=torch.float64)
    left.plot(grid, loss_of(grid), color=GREY, linewidth=1.8)
    start = float(loss_of(torch.tensor(WEIGHT)))
    tangent = [WEIGHT - 0.06, WEIGHT + 0.18]
    left.plot(
        tangent,
        [start + result.gradient * (w - WEIGHT) for w in tangent],
        color=VERMILION,
        linestyle="--",
        linewidth=1.4,
        label=pick(
            language,
            f"slope at {WEIGHT:.2f}: {result.gradient:.1f}",
            f"{WEIGHT:.2f} 处的斜率:{result.gradient:.1f}",
        ),
    )
    path = torch.tensor(result.paths[RATE], dtype=torch.float64)
    left.plot(path, loss_of(path), "o", color=BLUE, markersize=3.5, alpha=0.5, clip_on=False)
    for weight, side in ((WEIGHT, -1), (result.by_sgd, 1)):
        height = float(loss_of(torch.tensor(weight)))
        left.plot(weight, height, "o", color=BLUE, markersize=8)
        left.annotate(
            f"{weight:.2f}",
            (weight, height),
            (-10 if side < 0 else 10, -14 if side < 0 else 7),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            fontsize=11,
            color=BLUE,
        )
    left.plot(BEST, 0, "*", color=GREEN, markersize=13, clip_on=False)
    left.set_ylim(-0.005, 0.12)
    left.set_xlim(0.82, 1.45)
    tidy(
        left,
        title=f"{WEIGHT:.2f} − {RATE} × ({GRADIENT}) = {result.by_sgd:.2f}",
        x=pick(language, "weight w", "权重 w"),
        y=pick(language, "loss (w − 1.3)²/2", "损失 (w − 1.3)²/2"),
    )
    legend(left, loc="upper right")
    for (rate, weights), color in zip(result.paths.items(), (BLUE, GREEN, VERMILION), strict=True):
        right.plot(weights, color=color, linewidth=1.8, label=f"lr {rate:g}")
    right.axhline(BEST, color=INK, linewidth=0.8, linestyle=":")
    tidy(
        right,
        title=pick(language, "the same weight, more steps", "同一个权重,更多步"),
        x=pick(language, "steps taken", "已走步数"),
        y=pick(language, "weight w", "权重 w"),
    )
    legend(right, loc="center right")
    return figure
