"""Section 17.2.3: the loss around a trained GPT, and the way that the optimizer took to it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from gpt.config import OptimizerConfig, ScheduleConfig
from gpt.lr.lessons.picture import INK, VERMILION, legend, new_figure, tidy
from gpt.lr.lessons.tiny import build_tiny, loss_on, tiny_config, train_tiny, val_batch
from gpt.lr.lessons.words import Language, paragraphs, pick
from gpt.model import GPT, count_parameters

PATH_POINTS = 60
REACH = 1.0  # of the random plane: as far as each filter is long
MARGIN = 0.25  # of the path's plane, beyond the path, as a share of its extent


@dataclass(frozen=True, eq=False)
class Plane:
    """Losses over a grid: `losses[row, column]` at `ys[row]`, `xs[column]`."""

    xs: Tensor
    ys: Tensor
    losses: Tensor

    @property
    def rim(self) -> Tensor:
        """The losses along the four edges."""
        grid = self.losses
        return torch.cat([grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]])


@dataclass(frozen=True, eq=False)
class Landscape:
    """Two cuts through the loss: along random directions, and along the path's own.

    `path` is (points, 2) in the second plane, `shares` the path's variance along its two axes.
    All losses are on the same validation tokens; `trained_loss` is that of the trained weights.
    """

    n_parameters: int
    n_steps: int
    lr: float
    first_loss: float
    trained_loss: float
    random: Plane
    principal: Plane
    path: Tensor
    shares: tuple[float, float]


def measure(
    n_steps: int = 250, grid: int = 23, val_tokens: int = 1024, lr: float = 4e-3, seed: int = 1337
) -> Landscape:
    """Trains a tiny GPT, remembers its way, and evaluates `grid` x `grid` models on each plane."""
    training = build_tiny(
        tiny_config(
            OptimizerConfig(name="adamw", lr=lr, weight_decay=0.0),
            n_steps,
            schedule=ScheduleConfig(name="linear", warmup_fraction=0.1),
            seed=seed,
        )
    )
    inputs, targets = val_batch(training.config.model.context_len, val_tokens)
    model, every = training.model, max(1, n_steps // PATH_POINTS)
    points, first_loss = [flat_weights(model)], loss_on(model, inputs, targets)

    def remember(step: int) -> None:
        if step % every == 0 or step == n_steps:
            points.append(flat_weights(model))

    train_tiny(training, remember)
    generator = torch.Generator().manual_seed(seed)
    random_axes = torch.stack([random_direction(model, generator) for _ in range(2)])
    path_axes, path, shares = principal_axes(torch.stack(points))
    reach = torch.linspace(-REACH, REACH, grid)
    xs, ys = (_extent(path[:, axis], grid) for axis in range(2))
    batch = (inputs, targets)
    return Landscape(
        n_parameters=count_parameters(model),
        n_steps=n_steps,
        lr=lr,
        first_loss=first_loss,
        trained_loss=loss_on(model, inputs, targets),
        random=evaluate_plane(model, random_axes, (reach, reach), batch),
        principal=evaluate_plane(model, path_axes, (xs, ys), batch),
        path=path,
        shares=shares,
    )


def flat_weights(model: nn.Module) -> Tensor:
    """All parameters in one vector, (N,)."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def random_direction(model: nn.Module, generator: torch.Generator) -> Tensor:
    """A random direction, (N,), each filter of which is as long as the model's own.

    Source: Li et al. 2018 (arXiv:1712.09913), section 4. A filter is a row of a matrix; biases and
    norms stay where they are, as there.
    """
    parts = []
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            noise.zero_()
        else:
            lengths = parameter.detach().norm(dim=1, keepdim=True)
            noise *= lengths / noise.norm(dim=1, keepdim=True)
        parts.append(noise.flatten())
    return torch.cat(parts)


def principal_axes(points: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The plane that holds most of a path: axes (2, N), the path in it, and their shares.

    Source: Li et al. 2018, section 7.2: PCA of the differences to the last point, the origin.
    """
    differences = points - points[-1]
    _, lengths, axes = torch.linalg.svd(differences, full_matrices=False)
    shares = lengths.square() / lengths.square().sum()
    return axes[:2], differences @ axes[:2].T, (float(shares[0]), float(shares[1]))


def _extent(values: Tensor, n: int) -> Tensor:
    """A grid from below the least value to above the greatest, one of its points at 0."""
    low, high = float(values.min()), float(values.max())
    margin = MARGIN * max(high - low, 1e-6)
    low, high = low - margin, high + margin
    n_below = min(max(1, round((n - 1) * -low / (high - low))), n - 2)
    step = max(-low / n_below, high / (n - 1 - n_below))
    return torch.arange(-n_below, n - n_below) * step


def evaluate_plane(
    model: GPT, axes: Tensor, grid: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]
) -> Plane:
    """The loss at each point of a plane through the model's weights; the model stays as it is."""
    centre, moved = flat_weights(model), copy.deepcopy(model)
    xs, ys = grid
    losses = torch.empty(len(ys), len(xs))
    rows = tqdm(ys.tolist(), desc="landscape", unit="row", leave=False, disable=None)
    for row, y in enumerate(rows):
        for column, x in enumerate(xs.tolist()):
            weights = centre + x * axes[0] + y * axes[1]
            nn.utils.vector_to_parameters(weights, moved.parameters())
            losses[row, column] = loss_on(moved, *batch)
    return Plane(xs, ys, losses)


def explain(result: Landscape, language: Language) -> list[str]:
    """The numbers in words."""
    first, second = result.shares
    rim = result.random.rim
    n_points = result.random.losses.numel() + result.principal.losses.numel()
    return paragraphs(
        language,
        (
            f"A GPT of {result.n_parameters:,} parameters, trained for {result.n_steps} steps from "
            f"loss {result.first_loss:.2f} to {result.trained_loss:.2f}, then evaluated at "
            f"{n_points:,} points around its weights. Nothing is drawn by hand.",
            f"一个 {result.n_parameters:,} 参数的 GPT,训练 {result.n_steps} 步,损失从 "
            f"{result.first_loss:.2f} 降到 {result.trained_loss:.2f},再在权重周围 {n_points:,} 个点"
            "上计算损失。没有一处是手画的。",
        ),
        (
            "Left: two random directions, each filter as long as the model's own (Li et al. "
            f"2018). The trained weights lie at the bottom, {result.trained_loss:.2f}; a whole "
            f"weight's length away, at the rim, the loss is {float(rim.min()):.2f} to "
            f"{float(rim.max()):.2f}.",
            "左:两个随机方向,每个滤波器与模型自己的等长(Li et al. 2018)。训练好的权重在底部,"
            f"{result.trained_loss:.2f};走出一个权重的长度,到边缘,损失是 {float(rim.min()):.2f} 到 "
            f"{float(rim.max()):.2f}。",
        ),
        (
            "Right: the plane that holds most of the optimizer's path (PCA of its checkpoints): "
            f"{first:.0%} of its variance along one direction, {second:.0%} along the other. The "
            "chapter draws two parameters (17.2.3); these are two directions out of "
            f"{result.n_parameters:,}, and the rest of the way is not seen.",
            f"右:优化器路径所在的主要平面(检查点的 PCA):一个方向占路径方差的 {first:.0%},另一个占 "
            f"{second:.0%}。书中 17.2.3 画的是两个参数;这里是 {result.n_parameters:,} 个方向中的两"
            "个,其余的路看不见。",
        ),
    )


def draw(result: Landscape, language: Language) -> Figure:
    """The surface over the random plane; the contours of the path's plane, and the path."""
    figure = new_figure(11.5, 5)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.05])[0]
    _draw_surface(left.add_subplot(projection="3d"), result, language)
    axes = right.subplots()
    plane, path = result.principal, result.path
    filled = axes.contourf(plane.xs, plane.ys, plane.losses, levels=24, cmap="viridis")
    filled.set_edgecolor("face")  # else thin white lines show between the levels
    axes.plot(path[:, 0], path[:, 1], "o-", color="white", markersize=3, linewidth=1.2)
    _mark(axes, path[0].tolist(), "s", pick(language, "start", "起点"))
    _mark(axes, path[-1].tolist(), "*", pick(language, "trained", "训练结束"))
    tidy(
        axes,
        title=pick(
            language, "the optimizer's path, in its own plane", "优化器的路径,在它自己的平面里"
        ),
        x=pick(language, "principal direction 1", "主方向 1") + f" ({result.shares[0]:.0%})",
        y=pick(language, "principal direction 2", "主方向 2") + f" ({result.shares[1]:.0%})",
        grid=False,
    )
    legend(axes, loc="best")
    bar = right.colorbar(filled, ax=axes, shrink=0.9)
    bar.set_label(pick(language, "validation loss", "验证损失"), fontsize=9.5)
    bar.ax.tick_params(labelsize=9)
    return figure


def _mark(axes: Axes, place: Sequence[float], marker: str, label: str) -> None:
    size = 15 if marker == "*" else 8
    axes.plot(
        *place,
        marker,
        color=VERMILION,
        markersize=size,
        markeredgecolor="white",
        label=label,
        linestyle="none",
        zorder=4,
    )


def _draw_surface(
    axes: Any,  # noqa: ANN401 (matplotlib has no types for 3-D axes)
    result: Landscape,
    language: Language,
) -> None:
    plane = result.random
    x, y = torch.meshgrid(plane.xs, plane.ys, indexing="xy")
    axes.plot_surface(
        x.numpy(),
        y.numpy(),
        plane.losses.numpy(),
        cmap="viridis",
        rcount=60,
        ccount=60,
        linewidth=0.15,
        edgecolor="#FFFFFF60",
        antialiased=True,
    )
    low = float(plane.losses.min())
    floor = low - 0.25 * (float(plane.losses.max()) - low)
    axes.contour(
        x, y, plane.losses, levels=12, zdir="z", offset=floor, cmap="viridis", linewidths=0.8
    )
    axes.plot([0], [0], [floor], "*", color=VERMILION, markersize=12)
    axes.set_zlim(floor, float(plane.losses.max()))
    axes.view_init(elev=28, azim=-58)
    axes.set(xticks=(-REACH, 0, REACH), yticks=(-REACH, 0, REACH))
    axes.tick_params(labelsize=8, colors=INK, pad=0)
    axes.set_title(
        pick(language, "around the trained weights", "训练好的权重周围"), fontsize=10.5, color=INK
    )
    axes.set_xlabel(pick(language, "random direction 1", "随机方向 1"), fontsize=9)
    axes.set_ylabel(pick(language, "random direction 2", "随机方向 2"), fontsize=9)
    axes.zaxis.set_rotate_label(True)  # else short labels lie across
    axes.set_zlabel(pick(language, "validation loss", "验证损失"), fontsize=9)
