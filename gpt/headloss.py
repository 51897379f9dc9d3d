"""The loss of a large vocabulary, without ever holding all logits.

A slice of the tokens at a time goes through the head, becomes a loss and, in the same memory, the
gradient of its logits, and from there the gradients of head and features: nothing that is as large
as tokens x vocabulary outlives its slice, and nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt.parts import parts

# Fewer logits than this stay in the fast caches and gain nothing.
_LEAST_BYTES = 32 * 2**20
# Logits of a slice: large enough for matrix products at full speed. Measured with GPT-2's head on
# a CPU: 64 MiB costs 8 % more time than 128, 256 gains nothing more.
_SLICE_BYTES = 128 * 2**20
# Logits that become probabilities together: all passes over them from the second are from cache.
_BLOCK_BYTES = 2 * 2**20
# Rows of the head's gradient that are there in two formats at once.
_PRODUCT_BYTES = 32 * 2**20
_FLOAT_BYTES = 4


def head_loss_pays(n_tokens: int, n_features: int, vocab_size: int) -> bool:
    """Whether `head_loss_sum` is worth it for so many tokens; decided by nothing but sizes."""
    large = n_tokens * vocab_size * _FLOAT_BYTES >= _LEAST_BYTES
    return large and vocab_size > n_features


def slice_tokens(vocab_size: int) -> int:
    """Tokens whose logits `head_loss_sum` has in memory at once."""
    return _power_of_two(_SLICE_BYTES, vocab_size)


def head_loss_sum(features: Tensor, weight: Tensor, targets: Tensor, *, gradient: float) -> Tensor:
    """Cross entropy in nats of targets (B, T), summed over all tokens.

    `features` (B, T, C) are what the head reads, `weight` (V, C) is the head's. The products run in
    autocast's format, where it is on. Gradients are made on the way forward, where what the loss
    will be multiplied by is not known yet: `gradient` is that factor as expected, so that those of
    fp16 neither vanish nor have to be touched again. Another one is as right, only slower.
    """
    kind = features.device.type
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else weight.dtype
    if not torch.is_grad_enabled():  # a Function is told that its inputs need gradients even then
        features, weight = features.detach(), weight.detach()
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            features.flatten(0, -2), weight, targets.flatten(), gradient, dtype
        )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own signature)
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        gradient: float,
        dtype: torch.dtype,
    ) -> Tensor:
        trains = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.gradient = gradient
        matrix, inputs = weight.to(dtype), features.to(dtype)
        if trains:
            d_features, d_weight = torch.empty_like(features), torch.empty_like(weight)
            ctx.gradients = d_features, d_weight
        loss = torch.zeros((), device=features.device)
        rows = slice_tokens(weight.size(0))
        kept = rows * _FLOAT_BYTES // dtype.itemsize
        buffer = inputs.new_empty(min(kept, len(inputs)), weight.size(0))  # (kept, V)
        for group in parts(inputs, kept):
            for first in range(group.start, group.stop, rows):
                some = slice(first, min(first + rows, group.stop))
                logits = buffer[first - group.start : some.stop - group.start]
                torch.mm(inputs[some], matrix.mT, out=logits)
                loss += _to_gradient(logits, targets[some], gradient if trains else None)
                if trains:
                    d_features[some] = logits @ matrix
            if trains:
                logits = buffer[: group.stop - group.start]
                _add_products(d_weight, logits, inputs[group], first=group.start == 0)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were used up by a first backward()")
        (d_features, d_weight), ctx.gradients = ctx.gradients, None
        ratio = grad / ctx.gradient
        # Reading a number waits for an accelerator, and a tensor without numbers has none.
        if not (type(ratio) is Tensor and ratio.device.type == "cpu" and float(ratio) == 1):
            d_features.mul_(ratio)
            d_weight.mul_(ratio)
        return d_features, d_weight, None, None, None


def _add_products(d_weight: Tensor, logits: Tensor, features: Tensor, *, first: bool) -> None:
    """Puts logits (N, V) transposed times features (N, C) into d_weight (V, C), or adds them to it.

    Some rows at a time where formats differ, so that what is not yet in its format stays small.
    """
    if first and d_weight.dtype == logits.dtype:
        torch.mm(logits.mT, features, out=d_weight)
    elif d_weight.dtype == logits.dtype:
        d_weight.addmm_(logits.mT, features)
    else:
        rows = _power_of_two(_PRODUCT_BYTES, d_weight.size(1))
        both = zip(torch.split(d_weight, rows), torch.split(logits, rows, 1), strict=True)
        for part, columns in both:
            product = columns.mT @ features
            part.copy_(product) if first else part.add_(product)


def _to_gradient(logits: Tensor, targets: Tensor, gradient: float | None) -> Tensor:
    """The summed loss of (N, V) logits, which become its gradient by them, times `gradient`.

    Without one they become nothing of use. Softmax and loss are in fp32 whatever the format.
    """
    loss = torch.zeros((), device=logits.device)
    rows = _power_of_two(_BLOCK_BYTES, logits.size(1))
    for part in parts(logits, rows):
        block, places = logits[part], targets[part].unsqueeze(1)  # (n, V), (n, 1)
        values = block.float()  # (n, V); fp32: the block itself
        wanted = values.gather(1, places)
        top = values.amax(1, keepdim=True)
        total = values.sub_(top).exp_().sum(1, keepdim=True)
        loss += (total.log() + top - wanted).sum()
        if gradient is None:
            continue
        values.mul_(gradient / total)
        values.scatter_add_(1, places, values.new_full((), -gradient).expand_as(places))
        if values.dtype != block.dtype:
            block.copy_(values)
    return loss


def _power_of_two(n_bytes: int, vocab_size: int) -> int:
    """The most rows of fp32 logits, a power of two, in so many bytes; at least 1."""
    rows: int = max(1, n_bytes // (vocab_size * _FLOAT_BYTES))
    return 1 << (rows.bit_length() - 1)
