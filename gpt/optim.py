"""Parameter groups and optimizers by name. The rate over time is `schedule`'s business."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt.config import ModelConfig, OptimizerConfig
from gpt.device import cpu_has_bf16
from gpt.eager_optim import SGD, Adafactor, Adam, AdamW, EagerOptimizer, Muon
from gpt.model import GPT

Group = dict[str, Any]

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
# torch's own factor for Muon's updates: as large as AdamW's typical ones, so one rate fits both.
# Source: Liu et al. 2025 (arXiv:2502.16982), eq. 4.
_MUON_SCALE = "match_rms_adamw"


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, device: torch.device
) -> Optimizer:
    """Builds the optimizer that the config names, over the model's trainable parameters.

    Every parameter is in exactly one group, tied ones once. Groups carry a `name`: `matrices`
    (for muon and muP the hidden ones only), `embeddings` (muon and muP only: embeddings and head),
    and `rest` (norms and biases), whose weight decay is 0 unless the config says `all`.

    With muP (a GPT whose config has mup_base_width) groups carry rates of their own; the first one,
    whose rate is logged, is at `config.lr` itself where any is.
    """
    optimizer = _build(parameter_groups(model, config), config, device)
    # A GradScaler would leave it to a fused kernel to skip a step that overflowed. SGD's skips on
    # its first step with the momentum uninitialised; without this mark the scaler skips by itself.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _build(groups: list[Group], config: OptimizerConfig, device: torch.device) -> Optimizer:
    fused = device.type in _FUSED_DEVICES
    match config.name:
        case "sgd":
            return SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
        case "adam":
            return Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "adamw":
            return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "adafactor":
            # torch scales the step by each parameter's RMS: lr bounds the relative change, which
            # also never exceeds 1 / sqrt(step); 1e-2 is the paper's. betas and eps are not read.
            return Adafactor(groups, lr=config.lr)
        case "muon":
            return _build_muon(groups, config, device=device, fused=fused)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """The groups that `build_optimizer` uses, in a fixed order, without the empty ones."""
    shape = model.config if isinstance(model, GPT) else None
    mup = shape is not None and shape.mup_base_width is not None
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group_of(name, parameter, split=mup or config.name == "muon")
            members[group].append(parameter)
    groups: list[Group] = [
        {
            "name": name,
            "params": parameters,
            "weight_decay": config.weight_decay
            if name != "rest" or config.decay_on == "all"
            else 0.0,
        }
        for name, parameters in members.items()
        if parameters
    ]
    if shape is None or not mup:
        return groups
    factors = mup_factors(config.name, shape)
    for each in groups:
        _apply_mup(each, config, factors[each["name"]])
    return sorted(groups, key=lambda each: each["lr"] != config.lr)


def _group_of(name: str, parameter: nn.Parameter, *, split: bool) -> str:
    if parameter.ndim < 2:
        return "rest"
    # Blocks are numbered (`blocks.0.…`); embeddings and head, outside of them, are not hidden.
    hidden = any(part.isdigit() for part in name.split("."))
    return "matrices" if hidden or not split else "embeddings"


@dataclass(frozen=True)
class MupFactors:
    """What muP multiplies a group's rate, weight decay and eps by."""

    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


def mup_factors(optimizer: str, shape: ModelConfig) -> dict[str, MupFactors]:
    """Factors by name of group, for m = width_ratio times the base's width, m_L times its depth.

    Each makes one step change every feature as much as it did at the base, and rate x decay, the
    share that a step takes off a weight, what it was there.

    Source: adam, adamw: Dey et al. 2025 (arXiv:2505.01618), table 1 with alpha = 1. Deviation: eps
    shrinks by m in embeddings and head too, since the logits' 1 / m shrinks all gradients alike;
    the final norm goes with the blocks', as in that paper's code. sgd: Yang et al. 2022
    (arXiv:2203.03466) as their package mup has it, MuSGD. muon: derived here. Hidden updates must
    keep their spectral norm (Yang et al. 2023, arXiv:2310.17813), and torch's are orthogonal
    matrices x 0.2 sqrt(longer side), whose norm grows by sqrt(m).
    """
    m, depth = shape.width_ratio, shape.depth_ratio
    outer, rest = MupFactors(eps=1 / m), MupFactors(eps=1 / (m * depth))
    match optimizer:
        case "adam" | "adamw":
            hidden = MupFactors(lr=1 / m, decay=m, eps=1 / (m * depth))
        case "muon":
            hidden = MupFactors(lr=1 / math.sqrt(m), decay=math.sqrt(m))
        case "sgd":
            hidden = MupFactors()
            outer = rest = MupFactors(lr=m, decay=1 / m)
        case _:
            raise ValueError(f"no muP rule for {optimizer}; the config's check refuses it")
    return {"matrices": hidden, "embeddings": outer, "rest": rest}


def _apply_mup(group: Group, config: OptimizerConfig, factors: MupFactors) -> None:
    """Gives a group its own rate, decay and, where Adam updates it, eps."""
    by_muon = config.name == "muon" and group["name"] == "matrices"
    group["lr"] = factors.lr * (config.lr if by_muon else outer_rate(config))
    group["weight_decay"] *= factors.decay
    if config.name != "sgd" and not by_muon:
        group["eps"] = factors.eps * config.eps


def outer_rate(config: OptimizerConfig) -> float:
    """The peak rate of what Muon does not update; for other optimizers the rate of everything."""
    return config.adamw_lr if config.name == "muon" and config.adamw_lr is not None else config.lr


def _build_muon(
    groups: Sequence[Group], config: OptimizerConfig, *, device: torch.device, fused: bool
) -> Optimizer:
    hidden = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    parts: list[Optimizer] = []
    if hidden:
        muon = BatchedMuon if device.type == "cpu" else Muon
        parts.append(muon(hidden, lr=config.lr, momentum=config.momentum, adjust_lr_fn=_MUON_SCALE))
    if others:
        rate = outer_rate(config)
        parts.append(AdamW(others, lr=rate, betas=config.betas, eps=config.eps, fused=fused))
    if groups[0]["name"] != "matrices":
        parts.reverse()
    return CombinedOptimizer(parts)


class CombinedOptimizer(EagerOptimizer):
    """Several optimizers over different parameters that act as one.

    The groups and the state are the parts' own objects, so that a change of a rate or a loaded
    state reaches the part that uses it.
    """

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        """Takes the parts; no parameter may be in two of them."""
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Hands the groups and the one state, keyed by parameter, to the parts."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling keep: the parts too."""
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what copying, or `load_state_dict`, brings."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters of every part; the loss of `closure`, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class BatchedMuon(Muon):
    """torch's Muon for CPUs: matrices of one shape in one batch, in bf16 where the CPU has it.

    State, options and update rule are torch's. Where bf16 is emulated, it is done in fp32.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters that have a gradient; the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._momentum(parameter, group)
                    by_shape.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(
                    torch.stack([update for _, update in pairs]).to(dtype),
                    coefficients=group["ns_coefficients"],
                    steps=group["ns_steps"],
                    eps=group["eps"],
                )
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)
        return loss

    def _momentum(self, parameter: Tensor, group: Group) -> Tensor:
        """The averaged gradient, looking one step ahead (Nesterov)."""
        assert parameter.grad is not None
        assert group["nesterov"]
        assert group["adjust_lr_fn"] == _MUON_SCALE
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"])


def orthogonalize(
    matrices: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Brings the singular values of (B, rows, columns) matrices near 1, keeping their vectors.

    Source: Jordan et al. 2024, "Muon": X <- aX + (bA + cA^2)X with A = XX^T, on the wider side.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    if x.dtype == torch.float32 and x.shape[-1] >= 3 * x.shape[-2]:
        x = _whitening(x @ x.mT, coefficients, steps) @ x
        return x.mT if tall else x
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _whitening(gram: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The matrix by which `orthogonalize` in effect multiplies X, from A = XX^T alone.

    Each step is X <- PX with P = aI + bA + cA^2, and takes A to PAP: nothing as wide as X is
    needed between the first product and the last. For 4 times as wide it is 25 products of (rows,
    rows) instead of 45 in five steps. It wants fp32: squared, small values are lost sooner.
    """
    a, b, c = coefficients
    assert steps >= 1

    def factor_of(gram: Tensor) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        return factor

    product = factor = factor_of(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = factor @ product
    return product
