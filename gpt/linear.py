"""Linear layers whose products in bf16 keep both cores of a small machine busy.

oneDNN cuts a product into blocks for its threads. With AMX, two threads, and as many rows and
columns as a GPT-2 of 768 to 1,024 features has at a thousand tokens a step, it makes one block:
one core works, the other waits. Half of the rows at a time takes half the time. Measured over
grids of shapes, as cores busy: 1.0 where it is cut, 1.8 to 2.1 in halves; no gain beyond them.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.parts import parts

# Sizes of the products that are cut.
_ROWS = range(641, 1281)
_COLUMNS = range(640, 1025)
_LEAST_INNER = 512


class Linear(nn.Linear):
    """`nn.Linear`; in a CPU's autocast to bf16, products of some sizes are made in halves."""

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (..., out_features) of features (..., in_features)."""
        rows, sizes = x.numel() // self.in_features, (self.in_features, self.out_features)
        if not (_in_bf16(x) and (_is_cut(rows, *sizes) or _is_cut(rows, *reversed(sizes)))):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.bfloat16()
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2).bfloat16(), self.weight.bfloat16(), bias
        )
        return y.view(*x.shape[:-1], -1)


def _in_bf16(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _is_cut(rows: int, inner: int, columns: int) -> bool:
    """Whether a product of (rows, inner) and (inner, columns) may leave a core idle as a whole."""
    return rows in _ROWS and columns in _COLUMNS and inner >= _LEAST_INNER


def _has_two_amx_threads() -> bool:
    return torch.get_num_threads() == 2 and _has_amx()


@functools.cache
def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


class _Product(torch.autograd.Function):
    """x (N, in) times weight (out, in) transposed, plus bias (out,)."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's own signature)
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = _product(x, weight.mT, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight, None) if of_x else None,
            grad.mT @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


@torch.library.custom_op("gpt::product", mutates_args=())
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Matrix a (M, K) times b (K, N), plus bias (N,). One operation, also for the compiler."""
    out = a.new_empty(a.size(0), b.size(1))
    is_cut = _is_cut(a.size(0), *b.shape) and _has_two_amx_threads()
    for part in parts(a, -(-a.size(0) // 2) if is_cut else a.size(0)):
        if bias is None:
            torch.mm(a[part], b, out=out[part])
        else:
            torch.addmm(bias, a[part], b, out=out[part])
    return out


@_product.register_fake
def _product_shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))
