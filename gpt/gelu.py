"""GELU by torch's own kernel, where a block compiled for a CPU would calculate it itself, slower.

In bf16 what the compiler makes of it takes two to three times as long, forward and back: 5 % of a
step of GPT-2 124M.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu(x: Tensor, approximate: str) -> Tensor:
    """`F.gelu(x, approximate=approximate)`: its result and its gradient, to the bit."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        whole: Tensor = _gelu(x, approximate)
        return whole
    return F.gelu(x, approximate=approximate)


@torch.library.custom_op("gpt::gelu", mutates_args=())
def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


@torch.library.custom_op("gpt::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    back: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    return back


@_gelu.register_fake
def _gelu_shape(x: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


@_gelu_backward.register_fake
def _gelu_backward_shape(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:  # noqa: ANN401
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
    (x,) = ctx.saved_tensors
    return _gelu_backward(grad, x, ctx.approximate), None


_gelu.register_autograd(_back, setup_context=_keep)
