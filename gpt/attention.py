"""Causal attention in bf16 on a CPU, for training: torch's way there, products of our own back.

torch's flash kernel for the CPU computes its gradients in bf16 in small tiles and takes two to five
times as long for them as whole matrix products do, as long as a sequence is short.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt.parts import parts

# Longer sequences gain nothing: half of their products are of tokens that see nothing.
LONGEST = 512
# Scores that are there at once: enough for full speed, and a bound on the memory.
_SCORES = 2**23
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def dense_backward_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` is the faster way for q, k and v (B, H, T, D)."""
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.size(2) <= LONGEST
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """What `F.scaled_dot_product_attention(is_causal=True)` gives, to the bit, (B, H, T, D).

    `k` and `v` may have fewer heads than `q`, each for as many of its heads. The gradients are
    0.4 % from exact ones where torch's are 0.3 %, and where attention is sharp 0.7 where 0.4.
    """
    # The kernel takes features for neighbours; those of rotated heads of two may lie apart.
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    factor = q.size(-1) ** -0.5 if scale is None else scale
    y: Tensor = _CausalAttention.apply(q, k, v, factor)  # type: ignore[no-untyped-call]
    return y


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own signature)
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
    ) -> Tensor:
        y: Tensor = _flash(q, k, v, 0.0, True, attn_mask=None, scale=scale)[0]
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        q, k, v, dy = (each.flatten(0, 1) for each in (*ctx.saved_tensors, grad))  # (B·H, T, D)
        length = q.size(1)
        hidden = q.new_full((length, length), -torch.inf).triu_(1)
        at_once = max(1, _SCORES // length**2)
        whole = [torch.empty_like(each) for each in (q, k, v)]
        for part in parts(q, at_once):
            some = _gradients(q[part], k[part], v[part], dy[part], hidden, ctx.scale)
            for each, gradient in zip(whole, some, strict=True):
                each[part] = gradient
        dq, dk, dv = (each.view(grad.shape) for each in whole)
        return dq, dk, dv, None


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v (N, T, D), of N heads."""
    weights = torch.baddbmm(hidden, q, k.mT, alpha=scale).softmax(-1)  # (N, T, T)
    d_scores = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
    return (d_scores @ k).mul_(scale), (d_scores.mT @ q).mul_(scale), weights.mT @ grad
