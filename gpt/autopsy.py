"""Why a step's numbers are not finite: the rate, an overflow of fp16, or this batch; and where."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpt.checkpoint import Training
from gpt.device import autocast, eager
from gpt.model import GPT
from gpt.step import cross_entropy_sum

# Logits beyond this are no model's that still learns; a healthy one's stay below 100.
LOST_LOGIT = 1e3
LOST_LOSS = 1.5  # times ln V: worse than a guess, which no single bad batch makes of a sound model

# Larger weights are finite, and lost: the squares that norms are made of come near fp32's end.
LOST_WEIGHT = 1e18

Cause = Literal["rate", "overflow", "batch"]


@dataclass(frozen=True)
class Autopsy:
    """What was found.

    Attributes:
        cause: `rate`: the weights have left where the model works; `overflow`: finite in fp32, not
            in fp16; `batch`: the model is sound, this batch is not.
        where: the first layer whose output, or else the first parameter whose gradient is not
            finite; empty if none is when looked at again.
        rows: sequences of the batch whose loss is not finite, counted from 0.
        largest_logit: the largest finite |logit|, with fp16 that in fp32.
        broken: what of the weights or the optimizer's state is lost; empty if nothing is.
    """

    cause: Cause
    where: str
    rows: tuple[int, ...]
    largest_logit: float
    broken: str = ""

    def record(self) -> dict[str, object]:
        """For the log."""
        return {
            "cause": self.cause,
            "where": self.where,
            "rows": list(self.rows[:16]),
            "largest_logit": self.largest_logit,
        }


@torch.no_grad()
def examine(training: Training, inputs: Tensor, targets: Tensor) -> Autopsy:
    """Looks again at a batch (B, T) that gave no finite loss or gradient; changes nothing.

    The gradients of the step must still be in place.
    """
    model = training.model
    device = next(model.parameters()).device
    bad_gradient = next(
        (
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ),
        "",
    )
    size = training.config.train.micro_batch_size or inputs.size(0)
    found: list[str] = []
    rows: list[int] = []
    largest, total, finite_in_fp32 = 0.0, 0.0, True
    was_training = model.training
    model.eval()
    with eager(model):
        for first in range(0, inputs.size(0), size):
            x, y = (part[first : first + size].to(device) for part in (inputs, targets))
            with autocast(device, training.dtype), _first_bad_layer(model, found):
                logits = model(x).float()
            losses = torch.stack(
                [cross_entropy_sum(a[None], b[None]) for a, b in zip(logits, y, strict=True)]
            )
            rows += [first + int(row) for row in (~torch.isfinite(losses)).nonzero().flatten()]
            if training.dtype == torch.float16:  # an overflow leaves no logits to judge by
                logits = model(x).float()
                finite_in_fp32 &= bool(torch.isfinite(logits).all())
            finite = logits[torch.isfinite(logits)]
            largest = max(largest, float(finite.abs().max()) if finite.numel() else math.inf)
            total += float(losses.sum()) / targets.numel()
    model.train(was_training)
    broken = out_of_range(training)
    lost = largest > LOST_LOGIT or not total <= LOST_LOSS * math.log(model.vocab_size)
    cause: Cause = "batch"
    if training.dtype == torch.float16 and finite_in_fp32 and largest <= LOST_LOGIT:
        cause = "overflow"
    elif (lost and not 0 < len(rows) <= inputs.size(0) // 2) or broken:
        cause = "rate"
    return Autopsy(cause, found[0] if found else bad_gradient, tuple(rows), largest, broken)


@torch.no_grad()
def out_of_range(training: Training) -> str:
    """What holds a number that is out of range, weights before the optimizer; empty for nothing.

    Weights must be finite and not above LOST_WEIGHT, the optimizer's state finite. Where all is
    well, it costs one reading of them.
    """
    weights = {name: p.detach() for name, p in training.model.named_parameters()}
    state = {
        f"the optimizer's {key} of {name}": value
        for name, parameter in training.model.named_parameters()
        for key, value in training.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    for named, limit in ((weights, LOST_WEIGHT), (state, math.inf)):
        # The norm of largest elements, which no sum of large ones can overflow.
        largest = float(torch.nn.utils.get_total_norm([*named.values()], norm_type=math.inf))
        if not math.isfinite(largest) or largest > limit:
            return next(
                name
                for name, values in named.items()
                if not bool(torch.isfinite(values).all()) or float(values.abs().max()) > limit
            )
    return ""


@contextmanager
def _first_bad_layer(model: GPT, found: list[str]) -> Iterator[None]:
    """Appends the name of each module whose output is not finite, in the order they run in."""

    def hook_for(name: str) -> Any:  # noqa: ANN401 (torch's hooks are untyped)
        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            if not bool(torch.isfinite(out).all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
