"""Section 17.7.3: weight decay, coupled (the chapter's formula) and decoupled (its AdamW)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gpt.batches import Batches
from gpt.config import Config, OptimizerConfig
from gpt.lr.lessons.picture import BLUE, GREEN, GREY, INK, VERMILION, legend, new_figure, tidy
from gpt.lr.lessons.tiny import build_tiny, open_text, tiny_config, train_tiny
from gpt.lr.lessons.words import Language, paragraphs, pick

RATE, DECAY = 1e-3, 0.1
NOISE = tuple(10.0**power for power in (-3, -2, -1, 0, 1))
RULES: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda weights: SGD(weights, lr=RATE, weight_decay=DECAY),
    "Adam": lambda weights: Adam(weights, lr=RATE, weight_decay=DECAY),
    "AdamW": lambda weights: AdamW(weights, lr=RATE, weight_decay=DECAY),
}
COLORS = {"SGD": GREEN, "Adam": VERMILION, "AdamW": BLUE}


@dataclass(frozen=True, eq=False)
class Decay:
    """How much of the weights is left.

    `left` by optimizer: the mean weight after `n_steps` from 1, for each size of gradient noise.
    `rows` by optimizer: of each token's embedding in the GPT, its length over that before, (V,);
    `counts` is how often the token was trained on, (V,).
    """

    n_steps: int
    left: dict[str, tuple[float, ...]]
    gpt_steps: int
    counts: Tensor
    rows: dict[str, Tensor]

    @property
    def decoupled(self) -> float:
        """What (1 - lr·λ)^n leaves in the first experiment."""
        return float((1 - RATE * DECAY) ** self.n_steps)

    def unseen(self, name: str) -> float:
        """Mean share left of the embeddings of tokens that never occurred."""
        return float(self.rows[name][self.counts == 0].mean())


def measure(n_steps: int = 1000, n_weights: int = 500, gpt_steps: int = 200) -> Decay:
    """Lets weights without any true gradient decay; trains a GPT under both kinds of decay."""
    left = {name: noisy_weights(build, n_steps, n_weights) for name, build in RULES.items()}
    rows = {}
    for name in ("adam", "adamw"):
        optimizer = OptimizerConfig.model_validate(
            {"name": name, "lr": RATE, "weight_decay": DECAY}
        )
        config = tiny_config(optimizer, gpt_steps)
        training = build_tiny(config)
        before = training.model.tok_emb.weight.detach().norm(dim=1)
        train_tiny(training)
        after = training.model.tok_emb.weight.detach().norm(dim=1)
        rows["Adam" if name == "adam" else "AdamW"] = after / before
    return Decay(n_steps, left, gpt_steps, seen_tokens(config), rows)


def noisy_weights(
    build: Callable[[list[Tensor]], Optimizer], n_steps: int, n_weights: int
) -> tuple[float, ...]:
    """The mean of many weights after `n_steps` from 1, one mean for each size in `NOISE`.

    Their gradients are noise around 0: nothing is to be learned, only the decay has a direction.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(len(NOISE), n_weights, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor(NOISE, dtype=torch.float64).unsqueeze(1)
    optimizer = build([weights])
    for _ in range(n_steps):
        weights.grad = sizes * torch.randn(weights.shape, generator=generator).double()
        optimizer.step()
    return tuple(weights.detach().mean(dim=1).tolist())


def seen_tokens(config: Config) -> Tensor:
    """How often each token was an input of the run that the config describes, (V,)."""
    text = open_text()
    batches = Batches(
        text.train, config.model.context_len, config.train.batch_size, config.run.seed
    )
    assert config.train.max_steps is not None
    ids = torch.cat([batches.batch(step)[0].flatten() for step in range(config.train.max_steps)])
    return torch.bincount(ids, minlength=text.tokenizer.vocab_size)


def explain(result: Decay, language: Language) -> list[str]:
    """The numbers in words."""
    kept = {
        name: ", ".join(
            f"{size:g}: {left:.3f}" for size, left in zip(NOISE, result.left[name], strict=True)
        )
        for name in RULES
    }
    n_unseen = int((result.counts == 0).sum())
    formula = (1 - RATE * DECAY) ** result.gpt_steps
    return paragraphs(
        language,
        (
            "17.7.3 prints the coupled formula, θ - lr·(gradient + λ·θ), and 17.5.3 recommends "
            "the decoupled optimizer. With SGD they are the same; with Adam they are not, since "
            "it divides the sum by its own size.",
            "17.7.3 给出的是耦合公式 θ - lr·(梯度 + λ·θ),而 17.5.3 推荐的是解耦的优化器。用 SGD 时"
            "两者相同;用 Adam 时不同,因为它把这个和再除以它自己的大小。",
        ),
        (
            f"Weights of 1 whose gradient is pure noise, {result.n_steps} steps, lr {RATE:g}, λ "
            f"{DECAY:g}; what is left, by size of the noise. AdamW: {kept['AdamW']}; the formula "
            f"(1 - lr·λ)^n: {result.decoupled:.3f} for all. Adam: {kept['Adam']}: the smaller the "
            "gradient, the stronger the decay, and strong gradients hardly feel it. SGD: "
            f"{kept['SGD']}.",
            f"权重从 1 开始,梯度纯为噪声,{result.n_steps} 步,lr {RATE:g},λ {DECAY:g};按噪声大小,剩"
            f"下多少。AdamW:{kept['AdamW']};公式 (1 - lr·λ)^n:一律 {result.decoupled:.3f}。Adam:"
            f"{kept['Adam']}:梯度越小,衰减越强,梯度大的几乎不受影响。SGD:{kept['SGD']}。",
        ),
        (
            f"In a GPT, {result.gpt_steps} steps: the embeddings of the {n_unseen} tokens that "
            "never occurred have no gradient but the decay. AdamW leaves "
            f"{result.unseen('AdamW'):.4f} of their length, by the formula {formula:.4f}; Adam "
            f"leaves {result.unseen('Adam'):.4f}: it walks each weight to 0 at about lr a step, "
            "whatever λ is.",
            f"在 GPT 中,{result.gpt_steps} 步:从未出现的 {n_unseen} 个 token,其嵌入除衰减外没有梯"
            f"度。AdamW 留下长度的 {result.unseen('AdamW'):.4f},公式给出 {formula:.4f};Adam 留下 "
            f"{result.unseen('Adam'):.4f}:不管 λ 多大,每步都以约 lr 的步长走向 0。",
        ),
    )


def draw(result: Decay, language: Language) -> Figure:
    """What is left by size of the noise; what is left of a GPT's embeddings by frequency."""
    figure = new_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    left.axhline(result.decoupled, color=GREY, linewidth=1, linestyle=":")
    left.text(
        NOISE[-1],
        result.decoupled - 0.02,
        "(1 − lr·λ)ⁿ",
        fontsize=9,
        color=GREY,
        ha="right",
        va="top",
    )
    for name, values in result.left.items():
        left.plot(
            NOISE,
            values,
            "o-" if name != "SGD" else "s--",
            color=COLORS[name],
            linewidth=1.6,
            markersize=5,
            label=name,
        )
    left.set_xscale("log")
    left.set_ylim(-0.05, 1.08)
    tidy(
        left,
        title=pick(
            language,
            f"weights of 1 after {result.n_steps} steps of decay",
            f"权重 1,衰减 {result.n_steps} 步之后",
        ),
        x=pick(language, "size of the gradient (noise)", "梯度(噪声)的大小"),
        y=pick(language, "what is left", "剩下多少"),
    )
    legend(left, loc="lower right")
    _draw_embeddings(right, result, language)
    return figure


def _draw_embeddings(axes: Axes, result: Decay, language: Language) -> None:
    for name, shares in result.rows.items():
        axes.plot(
            result.counts, shares, ".", color=COLORS[name], markersize=6, alpha=0.55, label=name
        )
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("symlog", linthresh=0.1)
    xs, ys = (0, 1, 10, 100, 1000, 10_000), (0, 0.1, 0.3, 1, 3)
    axes.set(xlim=(-0.5, None), ylim=(-0.02, None))
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.set_yticks(ys, [f"{y:g}" for y in ys])
    axes.minorticks_off()
    tidy(
        axes,
        title=pick(
            language,
            f"a GPT's embeddings after {result.gpt_steps} steps",
            f"GPT 的词嵌入,{result.gpt_steps} 步之后",
        ),
        x=pick(language, "how often the token occurred", "token 出现的次数"),
        y=pick(language, "length / length before", "长度 / 原长度"),
    )
    legend(axes, loc="lower right")
