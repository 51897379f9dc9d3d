"""Parameter groups and optimizers by name. The rate over time is `schedule`'s business."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from gpt.config import OptimizerConfig
from gpt.device import cpu_has_bf16

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
    (for muon the hidden ones only), `embeddings` (muon only: embeddings and head), and `rest`
    (norms and biases), whose weight decay is 0 unless the config says `all`.
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
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter, config.name)].append(parameter)
    return [
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


def _group_of(name: str, parameter: nn.Parameter, optimizer: str) -> str:
    if parameter.ndim < 2:
        return "rest"
    # Blocks are numbered (`blocks.0.…`); embeddings and head, outside of them, are not hidden.
    hidden = any(part.isdigit() for part in name.split("."))
    return "matrices" if hidden or optimizer != "muon" else "embeddings"


def _build_muon(
    groups: Sequence[Group], config: OptimizerConfig, *, device: torch.device, fused: bool
) -> Optimizer:
    hidden = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    parts: list[Optimizer] = []
    if hidden:
        in_bf16 = device.type != "cpu" or cpu_has_bf16()
        muon = torch.optim.Muon if in_bf16 else Fp32Muon
        parts.append(muon(hidden, lr=config.lr, momentum=config.momentum, adjust_lr_fn=_MUON_SCALE))
    if others:
        rate = config.lr if config.adamw_lr is None else config.adamw_lr
        parts.append(AdamW(others, lr=rate, betas=config.betas, eps=config.eps, fused=fused))
    return CombinedOptimizer(parts)


class CombinedOptimizer(Optimizer):
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


class Fp32Muon(torch.optim.Muon):
    """torch's Muon with the orthogonalisation in fp32, for CPUs that only emulate bf16.

    State, options and update rule are torch's; matrices of one shape are done in one batch.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters that have a gradient; the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._momentum(parameter, group)
                    by_shape.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(
                    torch.stack([update for _, update in pairs]),
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
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
