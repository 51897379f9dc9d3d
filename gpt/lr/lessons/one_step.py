"""Section 17.4: one AdamW step on a real GPT, and why it is about lr, whatever the gradient."""

import copy
import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gpt.batches import Batches
from gpt.config import OptimizerConfig
from gpt.lr.lessons.picture import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    legend,
    new_figure,
    tidy,
)
from gpt.lr.lessons.tiny import CPU, build_tiny, open_text, tiny_config
from gpt.lr.lessons.words import Language, paragraphs, pick
from gpt.model import GPT
from gpt.optim import build_optimizer
from gpt.step import train_step

# The chapter's optimizer: AdamW at 1e-4, everything else as torch has it.
ADAMW = OptimizerConfig(name="adamw", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
SCALES = (1.0, 1e-3, 1e-6, 1e-9)
SHOWN = 24  # weights in the left panel
WQ = "blocks.0.attn.wq.weight"
# Printed in section 17.4.1: the loss, and three gradients of Wq.
CHAPTER_LOSS, CHAPTER_VOCAB = 11.515044, 100_277
CHAPTER_GRADIENTS = (-1.7941e-9, -2.7664e-10, -2.7543e-9)


@dataclass(frozen=True, eq=False)
class ScaledStep:
    """One step from the same weights with the gradient times `scale`, fp64, without decay.

    Sizes of the gradients, and of the moves in units of lr, of the weights of Wq and of the head.
    """

    scale: float
    gradients: dict[str, Tensor]
    moves: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class OneStep:
    """The first step of a GPT: the first block's Wq before and after, (C, C), and its gradient."""

    vocab_size: int
    loss: float
    before: Tensor
    gradient: Tensor
    after: Tensor
    scaled: tuple[ScaledStep, ...]

    @property
    def chance(self) -> float:
        """The loss of a model that knows nothing, ln V."""
        return math.log(self.vocab_size)


def measure(seed: int = 1337) -> OneStep:
    """Takes one real training step, and then the same step with other sizes of the gradient."""
    training = build_tiny(tiny_config(ADAMW, 1, seed=seed))
    fresh = copy.deepcopy(training.model)
    context_len = training.config.model.context_len
    inputs, targets = Batches(open_text().train, context_len, 16, seed).batch(0)
    result = train_step(training, inputs, targets)
    wq = training.model.get_parameter(WQ)
    assert wq.grad is not None
    gradients = [p.grad for p in training.model.parameters()]
    return OneStep(
        vocab_size=training.model.vocab_size,
        loss=result.loss,
        before=fresh.get_parameter(WQ).detach().clone(),
        gradient=wq.grad.clone(),
        after=wq.detach().clone(),
        scaled=tuple(scaled_step(fresh, gradients, scale) for scale in SCALES),
    )


def scaled_step(fresh: GPT, gradients: list[Tensor | None], scale: float) -> ScaledStep:
    """One step of AdamW from fresh weights with scaled gradients."""
    model = copy.deepcopy(fresh).double()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        parameter.grad = gradient.double() * scale
    config = ADAMW.model_copy(update={"weight_decay": 0.0})
    optimizer = build_optimizer(model, config, device=CPU)
    sizes, moves = {}, {}
    for name, key in (("Wq", WQ), ("head", "head.weight")):
        parameter = model.get_parameter(key)
        assert parameter.grad is not None
        sizes[name] = parameter.grad.abs().flatten()
        moves[name] = parameter.detach().clone()
    optimizer.step()
    for name, key in (("Wq", WQ), ("head", "head.weight")):
        moved = model.get_parameter(key).detach() - moves[name]
        moves[name] = moved.abs().flatten() / config.lr
    return ScaledStep(scale, sizes, moves)


def expected_move(gradient: float) -> float:
    """AdamW's first step in units of lr, without decay.

    Source: Kingma & Ba 2015, algorithm 1: at step 1 both corrected averages are the gradient's
    own, m = g and v = g², so that m / (√v + ε) = g / (|g| + ε).
    """
    return abs(gradient) / (abs(gradient) + ADAMW.eps)


def explain(result: OneStep, language: Language) -> list[str]:
    """The numbers in words."""
    before, after, gradient = (
        ", ".join(format(value, form) for value in tensor[0, :3].tolist())
        for tensor, form in (
            (result.before, ".4f"),
            (result.after, ".4f"),
            (result.gradient, ".1e"),
        )
    )
    moved = float((result.after - result.before).abs().median())
    size, move = (
        {
            (step.scale, name): float(values.median())
            for step in result.scaled
            for name, values in getattr(step, kind).items()
        }
        for kind in ("gradients", "moves")
    )
    theirs = ", ".join(f"{ADAMW.lr * expected_move(g):.1e}" for g in CHAPTER_GRADIENTS)
    return paragraphs(
        language,
        (
            f"At the start the model knows nothing: loss {result.loss:.4f}, chance is ln V = ln "
            f"{result.vocab_size} = {result.chance:.4f}. (The chapter prints {CHAPTER_LOSS:.4f}; "
            f"ln {CHAPTER_VOCAB:,}, cl100k_base's vocabulary, is {math.log(CHAPTER_VOCAB):.4f}.)",
            f"开始时模型什么都不知道:损失 {result.loss:.4f},随机猜测是 ln V = ln "
            f"{result.vocab_size} = {result.chance:.4f}。(书中打印 {CHAPTER_LOSS:.4f};cl100k_base "
            f"词表的 ln {CHAPTER_VOCAB:,} 是 {math.log(CHAPTER_VOCAB):.4f}。)",
        ),
        (
            f"One AdamW step, lr {ADAMW.lr:g}. Wq before: {before}. Gradient: {gradient}. After: "
            f"{after}. The fourth decimal moves, as in 17.4.3: half of Wq's weights move by more "
            f"than {moved:.2e}.",
            f"AdamW 走一步,lr {ADAMW.lr:g}。Wq 更新前:{before}。梯度:{gradient}。更新后:{after}。变"
            f"化在第四位小数,如 17.4.3:Wq 的权重有一半变化超过 {moved:.2e}。",
        ),
        (
            "But not, as 17.4.3 has it, because the gradient is small too. The median gradient of "
            f"Wq is {size[1.0, 'Wq']:.0e}, that of the output layer {size[1.0, 'head']:.0e}, "
            f"{size[1.0, 'head'] / size[1.0, 'Wq']:.0f} times larger; they move by "
            f"{move[1.0, 'Wq']:.3f} lr and {move[1.0, 'head']:.3f} lr. Adam's first step is "
            f"lr·g/(|g| + ε): the size of g cancels, until it comes down to ε = {ADAMW.eps:g}.",
            f"但原因并不像 17.4.3 所说还有“梯度也很小”。Wq 的梯度中位数是 {size[1.0, 'Wq']:.0e},输"
            f"出层是 {size[1.0, 'head']:.0e},大 {size[1.0, 'head'] / size[1.0, 'Wq']:.0f} 倍;两者的"
            f"步长是 {move[1.0, 'Wq']:.3f} lr 和 {move[1.0, 'head']:.3f} lr。Adam 的第一步是 "
            f"lr·g/(|g| + ε):g 的大小被约掉,直到它小到 ε = {ADAMW.eps:g} 的程度。",
        ),
        (
            "All gradients times 1e-3, 1e-6, 1e-9: the output layer moves by "
            f"{move[1e-3, 'head']:.3f}, {move[1e-6, 'head']:.3f}, {move[1e-9, 'head']:.1e} lr, Wq "
            f"by {move[1e-3, 'Wq']:.3f}, {move[1e-6, 'Wq']:.1e}, {move[1e-9, 'Wq']:.1e} lr. SGD's "
            "step is lr·g: it shrinks with the gradient from the start.",
            f"所有梯度乘以 1e-3、1e-6、1e-9:输出层的步长是 {move[1e-3, 'head']:.3f}、"
            f"{move[1e-6, 'head']:.3f}、{move[1e-9, 'head']:.1e} lr,Wq 是 {move[1e-3, 'Wq']:.3f}、"
            f"{move[1e-6, 'Wq']:.1e}、{move[1e-9, 'Wq']:.1e} lr。SGD 的步长 lr·g 始终随梯度变小。",
        ),
        (
            "The gradients that 17.4.1 prints are below ε. By that formula they make steps of "
            f"{theirs}: the fifth decimal and beyond, though two of the three weights that it "
            "prints change in the fourth.",
            f"17.4.1 打印的梯度小于 ε。按这个公式,它们的步长是 {theirs}:从第五位小数起,而书中三个权"
            "重有两个变在第四位。",
        ),
    )


def draw(result: OneStep, language: Language) -> Figure:
    """Gradients of all sizes beside steps of one size; step against gradient over decades."""
    figure = new_figure(10.5, 4.4)
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    upper, lower = left.subplots(2, 1, sharex=True)
    places = range(1, SHOWN + 1)
    upper.bar(places, result.gradient[0, :SHOWN].tolist(), color=VERMILION)
    moved = (result.after - result.before)[0, :SHOWN] / ADAMW.lr
    lower.bar(places, moved.tolist(), color=BLUE)
    for axes in (upper, lower):
        axes.axhline(0, color=INK, linewidth=0.8)
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    lower.set_ylim(-1.25, 1.25)
    tidy(
        upper,
        title=pick(language, "gradient: every size", "梯度:大小各异"),
        y=pick(language, "gradient", "梯度"),
    )
    tidy(
        lower,
        title=pick(language, "AdamW's first step: one size", "AdamW 的第一步:大小相同"),
        x=pick(language, "weight of Wq (first row)", "Wq 的权重(第一行)"),
        y=pick(language, "step / lr", "步长 / lr"),
    )
    axes = right.subplots()
    grid = torch.logspace(-16, 0, 200, dtype=torch.float64)
    formula = [expected_move(float(g)) for g in grid]
    axes.plot(grid, formula, color=INK, linewidth=1, zorder=3, label="|g| / (|g| + ε)")
    axes.plot(grid, grid, color=GREY, linestyle="--", linewidth=1.2, label="SGD: |g|")
    for step, color in zip(result.scaled, (BLUE, GREEN, ORANGE, PURPLE), strict=True):
        label = pick(language, f"AdamW, gradient × {step.scale:g}", f"AdamW,梯度 × {step.scale:g}")
        for name, every in (("Wq", 7), ("head", 60)):
            axes.plot(
                step.gradients[name][::every],
                step.moves[name][::every],
                ".",
                color=color,
                markersize=5,
                alpha=0.5,
                label=label if name == "Wq" else None,
            )
    axes.axvline(ADAMW.eps, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(ADAMW.eps / 1.6, 2e-8, "ε = 1e-8", fontsize=8.5, color=GREY, ha="right")
    axes.set(xscale="log", yscale="log", xlim=(1e-16, 1), ylim=(1e-8, 1e4))
    tidy(
        axes,
        title=pick(
            language, "the step is about lr until |g| nears ε", "|g| 接近 ε 之前,步长约为 lr"
        ),
        x=pick(language, "size of the gradient |g|", "梯度大小 |g|"),
        y=pick(language, "size of the first step / lr", "第一步的大小 / lr"),
    )
    legend(axes, loc="upper left")
    return figure
