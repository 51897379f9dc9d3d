"""A model with its linear layers packed, and what that costs in loss, measured."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.device import cpu_has_bf16
from gpt.model import GPT, Attention
from gpt.packed import (
    BFloat16Linear,
    BlockedLinear,
    HalfLinear,
    Int8Linear,
    Packed,
    Part,
    has_half_kernel,
)


class Cost(NamedTuple):
    """What packed weights add to the loss, in nats a token, with its standard error."""

    loss: float
    error: float
    n_tokens: int


def pack(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy in evaluation mode whose linear layers are packed; all other weights are shared.

    In int8, bf16 or fp16; fp32 is another order of the same weights.
    """
    shared = (*model.parameters(), *model.buffers())
    packed = copy.deepcopy(model, memo={id(one): one for one in shared}).eval()
    for module in list(packed.modules()):
        if isinstance(module, Attention):
            whole = _packed([module.wq, module.wk, module.wv], dtype)
            for index, name in enumerate(("wq", "wk", "wv")):
                setattr(module, name, Part(whole, index))
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, _packed([layer], dtype))
    return packed


def _packed(layers: list[nn.Linear], dtype: torch.dtype) -> Packed:
    if dtype == torch.int8:
        return Int8Linear(layers)
    if dtype == torch.float32:
        return BlockedLinear(layers)
    if dtype == torch.bfloat16 and multiplies_bf16():
        return BFloat16Linear(layers)
    return HalfLinear(layers, dtype)


def halves_pay(dtype: torch.dtype) -> bool:
    """Whether there are products for weights in bf16 or fp16 here that are worth packing them."""
    return has_half_kernel() or (dtype == torch.bfloat16 and multiplies_bf16())


def multiplies_bf16() -> bool:
    """Whether the products of bf16 weights are in bf16 too: the CPU has them, and torch oneDNN."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and cpu_has_bf16()


def linear_bytes(model: GPT) -> int:
    """Bytes of the linear layers, which a token reads once each."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = {id(module): module for module in model.modules() if isinstance(module, Packed)}
    return sum(layer.weight.nbytes for layer in layers) + sum(
        module.n_bytes for module in packed.values()
    )


@torch.inference_mode()
def cost_of(model: GPT, packed: GPT, batches: Iterable[tuple[Tensor, Tensor]]) -> Cost:
    """The loss of the packed model less that of the model itself, over the same tokens."""
    losses = [
        _losses(packed, inputs, targets).sub_(_losses(model, inputs, targets))
        for inputs, targets in batches
    ]
    differences = torch.cat(losses).double()
    error = float(differences.std()) / math.sqrt(len(differences))
    return Cost(float(differences.mean()), error, len(differences))


def _losses(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, (B T)."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
