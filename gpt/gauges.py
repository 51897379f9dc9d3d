"""What a step tells beside its loss: update ratios, Adam's RMS, slope, noise, activations.

Everything is measured on a sample of each parameter, on logged steps only, and changes nothing of
what a run computes. Nothing is in float64 on a device, since Apple's have none. What the numbers
mean is `health`'s business.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt.device import eager
from gpt.model import GPT, Attention, Block, rotate

# Elements looked at in each parameter; smaller ones are taken whole.
SAMPLE = 65_536
# What a step's noise and signal weigh in their running means: about the last ten measurements.
NOISE_WEIGHT = 0.1
NOISE_LEAST = 5
# Tokens of one sequence whose attention is looked at; the products grow with their square.
INSPECT_TOKENS = 256


@dataclass(frozen=True)
class Moves:
    """What one update did to the weights.

    Attributes:
        update_ratio: length of the update over length of the weights.
        by_parameter: the same for each parameter by name; inf where the weights are all zero.
        grad_norms: lengths of the gradients by parameter, as the optimizer saw them.
        adam_rms: root of the mean of g^2 / v over what Adam updates; None where nothing is. Source:
            Wortsman et al. 2023 (arXiv:2304.13013), section 3.2, `RMS_t`.
    """

    update_ratio: float
    by_parameter: dict[str, float]
    grad_norms: dict[str, float]
    adam_rms: float | None


@dataclass(frozen=True)
class Pair:
    """What two steps in a row tell together, from gradients g of their own batches.

    Attributes:
        slope_before: g_1 . dw, the loss's slope along the first step's update, where it started.
        slope_after: g_2 . dw, the same where it arrived, on another batch: below zero, a longer
            step would have gone lower; above, it went too far. Both in nats. Source: Baydin et al.
            2018 (arXiv:1703.04782), eq. 5: the derivative of the loss by the rate, times the rate.
        signal: g_1 . g_2, an unbiased estimate of the squared length of the true gradient.
        noise: the trace of the covariance of one step's gradient, from what both differ in.
    """

    slope_before: float
    slope_after: float
    signal: float
    noise: float


class Gauge:
    """Measures the steps that it is told to. One lives as long as the loop that steps.

    A step calls `gradients` once they are whole and unscaled, `before_update` after clipping,
    and `after_update`. `moves` and `pair` are what the last such step gave, None if nothing.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Takes the model and optimizer that will be stepped."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._strides = [_stride(p) for p in self._parameters]
        self._sizes = [sample_size(p) for p in self._parameters]
        self._optimizer = optimizer
        self._weights: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # gradient and update of the step before
        self._gradient: Tensor | None = None
        self._full = self._first = False
        self.moves: Moves | None = None
        self.pair: Pair | None = None

    def watch(self, *, full: bool, first: bool) -> None:
        """Says what of the next step is wanted: `full`, its moves; `first`, that of a pair."""
        self._full, self._first = full, first
        self.moves = self.pair = None

    @torch.no_grad()
    def gradients(self) -> None:
        """To be called with the whole batch's gradient, before it is clipped."""
        if self._last is None and not self._first:
            return
        now = self._sample([p.grad for p in self._parameters])
        if self._last is not None:
            before, update = self._last
            values = torch.stack(
                [before @ update, now @ update, before @ now, before @ before, now @ now]
            )
            slope_before, slope_after, signal, first, second = values.tolist()
            noise = max(0.0, (first + second) / 2 - signal)
            self.pair = Pair(slope_before, slope_after, signal, noise)
            self._last = None
        self._gradient = now if self._first else None

    @torch.no_grad()
    def before_update(self) -> None:
        """To be called right before the weights change."""
        if self._full or self._first:
            self._weights = self._sample(list(self._parameters))

    @torch.no_grad()
    def after_update(self) -> None:
        """To be called right after the weights have changed, gradients still in place."""
        if self._weights is None:
            return
        before, self._weights = self._weights, None
        update = self._sample(list(self._parameters)) - before
        if self._first and self._gradient is not None:
            self._last, self._gradient = (self._gradient, update), None
        if self._full:
            self.moves = self._moves(before, update)

    def forget(self) -> None:
        """To be called for a step that is not taken: nothing of it counts."""
        self._weights = self._last = self._gradient = None
        self.moves = self.pair = None

    def _moves(self, before: Tensor, update: Tensor) -> Moves:
        gradient = self._sample([p.grad for p in self._parameters])
        parts = (self._lengths(x) for x in (before, update, gradient))
        weights, moved, gradients = (part.tolist() for part in parts)
        return Moves(
            update_ratio=_ratio(_norm(moved), _norm(weights)),
            by_parameter=dict(zip(self._names, map(_ratio, moved, weights), strict=True)),
            grad_norms=dict(zip(self._names, gradients, strict=True)),
            adam_rms=self._adam_rms(gradient),
        )

    def _adam_rms(self, gradient: Tensor) -> float | None:
        """See `Moves.adam_rms`; v is corrected for its start at zero."""
        groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        rows: list[tuple[Tensor, Tensor, int, dict[str, Any]]] = []
        steps: list[Tensor] = []
        parts = zip(
            self._parameters, self._strides, torch.split(gradient, self._sizes), strict=True
        )
        for parameter, stride, g in parts:
            state = self._optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                rows.append((g, _every(state["exp_avg_sq"], stride), stride, groups[parameter]))
                steps.append(state["step"])
        if not rows:
            return None
        gs, vs, strides, options = zip(*rows, strict=True)
        # Each element looked at stands for `stride` of them.
        rise = [
            stride / (1 - group["betas"][1] ** step)
            for stride, group, step in zip(strides, options, _numbers(steps), strict=True)
        ]
        least = [stride * group["eps"] ** 2 for stride, group in zip(strides, options, strict=True)]
        v = torch._foreach_clamp_min(torch._foreach_mul(vs, rise), least)
        ratios = torch._foreach_div(torch._foreach_mul(gs, gs), v)
        sums = _numbers(torch._foreach_norm(ratios, 1))
        total = sum(stride * each for stride, each in zip(strides, sums, strict=True))
        count = sum(stride * g.numel() for stride, g in zip(strides, gs, strict=True))
        return math.sqrt(total / count)

    def _sample(self, tensors: list[Any]) -> Tensor:
        """One flat fp32 vector of all samples, scaled so that products estimate those of all."""
        pieces = []
        for tensor, parameter, stride in zip(tensors, self._parameters, self._strides, strict=True):
            source = torch.zeros_like(parameter) if tensor is None else tensor.detach()
            piece = _every(source, stride).float()
            pieces.append(piece if stride == 1 else piece * math.sqrt(stride))
        return torch.cat(pieces)

    def _lengths(self, sample: Tensor) -> Tensor:
        return torch.stack(torch._foreach_norm(torch.split(sample, self._sizes)))


class NoiseMeter:
    """Gradient noise scale in samples of whatever `signal` and `noise` are counted per batch of.

    Both are averaged before their ratio is taken. Source: McCandlish et al. 2018
    (arXiv:1812.06162), appendix A.1: B_simple = tr(covariance of one sample) / |G|^2.
    """

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self._signal = self._noise = 0.0
        self._count = 0

    def add(self, signal: float, noise: float) -> None:
        """One measurement: |G|^2 and the variance of a step's gradient."""
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return
        self._count += 1
        weight = max(NOISE_WEIGHT, 1 / self._count)
        self._signal += weight * (signal - self._signal)
        self._noise += weight * (noise - self._noise)

    def scale(self, batch: int) -> float | None:
        """The noise scale in the unit of `batch`; None before there is enough, or no signal."""
        if self._count < NOISE_LEAST or self._signal <= 0:
            return None
        return batch * self._noise / self._signal


def sample_size(parameter: Tensor) -> int:
    """How many elements of a parameter are looked at."""
    return math.ceil(parameter.numel() / _stride(parameter))


def _stride(parameter: Tensor) -> int:
    """Which elements are looked at: every how manyth, such that all columns have their turn.

    A stride with a divisor in common with the width would look at some features alone.
    """
    stride = max(1, math.ceil(parameter.numel() / SAMPLE))
    width = parameter.size(-1) if parameter.dim() > 1 else 1
    while math.gcd(stride, width) > 1:
        stride += 1
    return stride


def _every(tensor: Tensor, stride: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat if stride == 1 else flat[::stride]


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalars, fetched from the device in one."""
    values: list[float] = torch.stack(list(scalars)).tolist()
    return values


def _norm(lengths: list[float]) -> float:
    return math.sqrt(sum(length**2 for length in lengths))


def _ratio(moved: float, length: float) -> float:
    if length > 0:
        return moved / length
    return math.inf if moved > 0 else 0.0


@torch.no_grad()
def inspect(model: GPT, ids: Tensor) -> dict[str, dict[str, float]]:
    """How large things get inside the model on one sequence, ids (1, T): figures by block.

    `rms`: of the stream behind the block; `attn_logit_max`: the largest |q.k| x scale;
    `dead_share`: share of the MLP's features that are 0 at every token (relu2), or below 1e-6 of
    the largest. Runs without dropout, draws nothing, and leaves the model's mode as it was.
    """
    figures: dict[str, dict[str, float]] = {"rms": {}, "attn_logit_max": {}, "dead_share": {}}
    training = model.training
    model.eval()
    try:
        with eager(model), _hooks(model, figures):
            model(ids[:1, :INSPECT_TOKENS])
    finally:
        model.train(training)
    return figures


@contextmanager
def _hooks(model: GPT, figures: dict[str, dict[str, float]]) -> Iterator[None]:
    """Fills in `figures` while the model runs forward."""

    def stream(name: str) -> Any:  # noqa: ANN401 (torch's hooks are untyped)
        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            figures["rms"][name] = float(out.float().square().mean().sqrt())

        return hook

    def attention(name: str) -> Any:  # noqa: ANN401
        def hook(module: Attention, inputs: tuple[Any, ...]) -> None:
            figures["attn_logit_max"][name] = largest_logit(module, inputs[0], inputs[1])

        return hook

    def features(name: str) -> Any:  # noqa: ANN401
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            peaks = inputs[0].float().abs().flatten(0, -2).amax(0)  # (d_ff)
            dead = peaks <= 1e-6 * peaks.amax()
            figures["dead_share"][name] = float(dead.float().mean())

        return hook

    handles = []
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        name = f"blocks.{number}"
        handles.append(block.register_forward_hook(stream(name)))
        handles.append(block.attn.register_forward_pre_hook(attention(name)))
        handles.append(block.mlp.down.register_forward_pre_hook(features(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def largest_logit(attention: Attention, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> float:
    """The largest |q.k| x scale that attention would see for x (1, T, C), masked or not."""
    q, k, _ = (heads.transpose(1, 2) for heads in attention.project(x))  # (1, H, T, D)
    if attention.qk_norm:
        q = nn.functional.rms_norm(q, (attention.head_dim,), eps=attention.norm_eps)
        k = nn.functional.rms_norm(k, (attention.head_dim,), eps=attention.norm_eps)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    return float((q.float() @ k.float().mT).abs().amax()) * scale
