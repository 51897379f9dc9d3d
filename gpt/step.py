"""One optimizer step, and one evaluation; when they happen is `train`'s business."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.checkpoint import Training
from gpt.data import Split, eval_batches
from gpt.device import autocast, eager
from gpt.gauges import Gauge
from gpt.guard import SpikeGuard
from gpt.headloss import head_loss_pays, head_loss_sum
from gpt.model import GPT

OVERFLOW = "overflow"
# Numbers that are squared and added up in fp32; the sums are added in fp64.
_NORM_PART = 2**17


class NonFiniteError(Exception):
    """The loss or the gradient is not a number; the weights were not updated."""

    def __init__(self, what: str, loss: float, grad_norm: float) -> None:
        """Takes which of the two it was, and both values."""
        super().__init__(what)
        self.what, self.loss, self.grad_norm = what, loss, grad_norm


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is in nats per token over the whole step, before the update.

    `skipped` says why the weights were not updated: an `overflow` of fp16's scaled gradient, or an
    outlier, in words, that the guard refused. Empty: they were.
    """

    loss: float
    grad_norm: float
    lr: float
    clipped: bool = False
    skipped: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Loss over the validation tokens; its standard error is that between batches, None for one."""

    loss: float
    bits_per_byte: float
    tokens: int
    standard_error: float | None = None


def train_step(
    training: Training,
    inputs: Tensor,
    targets: Tensor,
    *,
    gauge: Gauge | None = None,
    guard: SpikeGuard | None = None,
) -> StepResult:
    """Forward, backward, clip, update, next rate: (B, T) ids in, one update of the weights.

    The batch is worked off in micro-batches; the loss is the mean over all its tokens, so that
    the size of a micro-batch changes nothing but rounding. With fp16, a step whose scaled gradient
    overflows is skipped: the weights and the schedule stay, the scale shrinks. A step that `guard`
    calls an outlier is skipped too. `gauge` measures what it was told to.

    Raises NonFiniteError, before the update, if loss or gradient is not finite.
    """
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = _backward(training, inputs, targets)
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(parameters)
    grad_norm, lr = float(norm), float(optimizer.param_groups[0]["lr"])
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        skipped = _overflow(training, loss, grad_norm)
    else:
        skipped = guard.outlier(loss, grad_norm) if guard is not None else ""
    if skipped:
        if gauge is not None:
            gauge.forget()
        if skipped == OVERFLOW:
            _back_off(scaler)
        else:
            scaler.update()
        return StepResult(loss, grad_norm, lr, skipped=skipped)
    if gauge is not None:
        gauge.gradients()
    limit = training.config.train.grad_clip
    clipped = bool(limit) and grad_norm > float(limit or 0)
    if clipped:
        torch.nn.utils.clip_grads_with_norm_(parameters, float(limit or 0), norm)
    if gauge is not None:
        gauge.before_update()
    scaler.step(optimizer)
    scaler.update()
    training.scheduler.step()
    if gauge is not None:
        gauge.after_update()
    if guard is not None:
        guard.took(loss, grad_norm)
    return StepResult(loss, grad_norm, lr, clipped=clipped)


def _overflow(training: Training, loss: float, grad_norm: float) -> str:
    """OVERFLOW where fp16's scale, which can still shrink, explains it; else NonFiniteError."""
    scaler = training.scaler
    if math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1:
        return OVERFLOW
    if scaler.is_enabled():
        scaler.update(scaler.get_scale())  # as if this step had not been: ready for the next
    raise NonFiniteError("gradient" if math.isfinite(loss) else "loss", loss, grad_norm)


def _back_off(scaler: torch.amp.GradScaler) -> None:
    """Shrinks fp16's scale as the scaler itself does at an overflow, on the word of the norm.

    The scaler looks at elements: it would take a step whose norm alone is beyond all numbers, and
    where several processes hold parts of the gradient, each would decide by its own.
    """
    shrunk = scaler.get_scale() * scaler.get_backoff_factor()
    scaler.update(shrunk)  # ready for the next step
    scaler.load_state_dict(scaler.state_dict() | {"scale": shrunk, "_growth_tracker": 0})


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Length of the whole gradient. The one place where several processes would add theirs up.

    On a CPU torch's own norm of a matrix of 40 million numbers is 0.3 % off, and takes twice as
    long as products of parts of it with themselves.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    parts = [p for each in gradients for p in torch.split(each.reshape(-1), _NORM_PART)]
    squares = torch.stack([torch.dot(part, part) for part in parts])
    return squares.double().sum().sqrt().float()


@torch.no_grad()
def evaluate(
    training: Training, split: Split, device: torch.device, should_stop: Callable[[], bool]
) -> Evaluation | None:
    """Mean loss over the same tokens of `split` each time, without dropout.

    Returns None if `should_stop` says so on the way. Draws no random number.
    """
    config, model = training.config, training.model
    batch_size = config.train.micro_batch_size or config.train.batch_size
    byte_lengths = training.tokenizer.byte_lengths
    model.eval()
    total, tokens, n_bytes = 0.0, 0, 0
    means: list[float] = []
    with eager(model):
        for inputs, targets in eval_batches(
            split, config.model.context_len, batch_size, config.eval.max_tokens
        ):
            if should_stop():
                return None
            with autocast(device, training.dtype):
                part = float(loss_sum(model, inputs.to(device), targets.to(device)))
            total += part
            means.append(part / targets.numel())
            tokens += targets.numel()
            n_bytes += int(np.take(byte_lengths, targets.numpy()).sum())
    loss = total / tokens
    error = None
    if len(means) > 1:
        spread = statistics.stdev(means) if math.isfinite(loss) else math.nan
        error = spread / math.sqrt(len(means))
    return Evaluation(loss, total / math.log(2) / max(1, n_bytes), tokens, error)


def loss_sum(model: GPT, inputs: Tensor, targets: Tensor, *, gradient: float = 1.0) -> Tensor:
    """Loss in nats of ids (B, T), summed over all tokens, in the autocast that it is called in.

    `gradient` is what the sum will be multiplied by on its way to `backward`, where that is known.
    """
    weight = model.head.weight
    if head_loss_pays(targets.numel(), weight.size(1), weight.size(0)):
        features = model(inputs, head=False)
        return head_loss_sum(features, weight, targets, gradient=gradient)
    return cross_entropy_sum(model(inputs), targets)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss in nats, summed over all tokens: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _backward(training: Training, inputs: Tensor, targets: Tensor) -> float:
    """Adds up the gradient of the mean loss over all micro-batches; returns that loss."""
    device = next(training.model.parameters()).device
    size = training.config.train.micro_batch_size or inputs.size(0)
    loss = torch.zeros((), device=device)
    gradient = training.scaler.get_scale() / targets.numel()
    for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
        with autocast(device, training.dtype):
            total = loss_sum(training.model, x.to(device), y.to(device), gradient=gradient)
        part = total / targets.numel()
        training.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    return float(loss)
