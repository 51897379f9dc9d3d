"""Linear layers laid out for the CPU's products, most in fewer bits; in and out stays fp32.

A token's products read every weight once, so that fewer bytes a weight are fewer milliseconds a
token. The formats:

    int8        a weight is a whole number from -127 to 127 times its row's step. The vector that
                meets it is cut into steps of its own, and whole numbers are multiplied. Where a
                few large numbers make its steps coarse for the others, what rounding left over
                is multiplied in a second pass.
    bf16, fp16  weights rounded to that format, exactly; the arithmetic is fp32. With bf16, where
                the CPU multiplies it, what the layers read and give is rounded to bf16 too, as on
                GPUs, and added up in fp32.
    fp32        the weights themselves, in the order in which products with many rows read them.
"""

import math

import torch
from torch import Tensor, nn

from gpt.errors import UserError
from gpt.int8_c import whole_product

LARGEST = 127
# A sum of more products than this could leave the 32 bits that it is kept in.
MOST_FEATURES = 2**31 // LARGEST**2
# A vector whose largest number is more than this many times its root mean square is an outlier's:
# rounding it to 127 steps would put an error of over 16 / 127 / sqrt(12) = 4 % on its numbers.
OUTLIER = 16.0
# What the second pass resolves: the rest after rounding, at most half a step, in 127 parts.
FINER = 254
# Of the halves that fp16 can hold, the largest a matrix is scaled to: far from both of its ends.
_HALF_TOP = 2.0**14
# The number of rows that oneDNN's order is chosen for; any number is multiplied.
_ROWS_EXPECTED = 32


class Packed(nn.Module):
    """One or several linear layers that read the same features, as one product."""

    sizes: tuple[int, ...]
    """Outputs of each layer."""
    in_features: int
    n_bytes: int
    """Of the weights as they are kept."""
    rounds = False
    """Whether what the layers read and give is rounded to bf16."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Takes the layers; with biases all or none of them."""
        super().__init__()
        self.sizes = tuple(layer.out_features for layer in layers)
        self.in_features = layers[0].in_features
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases).float() if biases else None
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> "Packed":
        """Itself: what is packed never changes, and copies of a model share it."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """What the layers give for features (…, in_features), side by side."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """The weights (sum of sizes, in_features) in their format, row after row."""
        raise NotImplementedError

    def part(self, index: int, x: Tensor) -> Tensor:
        """What one of the layers gives. The product is shared by all parts of one x, in order."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self(x).split(self.sizes, -1)
        part = self._last[1][index]
        if index == len(self.sizes) - 1:
            self._last = None
        return part


class Part(nn.Module):
    """One layer of several that are packed together."""

    def __init__(self, whole: Packed, index: int) -> None:
        """Takes the layers and the number of this one."""
        super().__init__()
        self.whole, self.index = whole, index

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives for features (…, in_features)."""
        return self.whole.part(self.index, x)


class Int8Linear(Packed):
    """Linear layers in int8, a step for each row of weights and one for each vector they meet."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Rounds the weights."""
        super().__init__(layers)
        if self.in_features > MOST_FEATURES:
            raise UserError(
                f"--quantize int8: a layer reads {self.in_features:,} features, a sum of more than "
                f"{MOST_FEATURES:,} products may overflow; leave --quantize out"
            )
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        self.step = steps(weight)[:, 0]  # (out_features,)
        self.whole = (weight / self.step[:, None]).round_().to(torch.int8)
        self.n_bytes = self.whole.nbytes + self.step.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """What the layers give for features (…, in_features), side by side."""
        rows = x.reshape(-1, self.in_features)
        step = steps(rows)  # (rows, 1)
        scaled = rows / step
        whole = scaled.round()
        y = whole_product(whole, self.whole)
        # Of numbers that are 127 at most, a small mean square means one that stands out.
        coarse = (scaled.square().mean(-1) < (LARGEST / OUTLIER) ** 2).nonzero()[:, 0]
        if len(coarse):
            rest = (scaled[coarse] - whole[coarse]).mul_(FINER).round_()
            y[coarse] += whole_product(rest, self.whole).div_(FINER)
        y.mul_(step).mul_(self.step)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def rows(self) -> Tensor:
        """The whole numbers, themselves."""
        return self.whole


def steps(rows: Tensor) -> Tensor:
    """The step of each row (rows, 1) that lets its largest number be 127; never 0."""
    largest = rows.abs().amax(-1, keepdim=True)
    return largest.clamp_(min=1e-30).div_(LARGEST)


class HalfLinear(Packed):
    """Linear layers in bf16 or fp16, multiplied in fp32 by a kernel that reads halves (FBGEMM).

    The kernel reads fp16. A bf16 weight has fewer digits than fp16 but a wider range, so a matrix
    is multiplied by a power of two that puts its largest weight near the top of fp16's range: what
    lies within 2^-27 of that weight is exact, and below that the error is at most 2^-38 of it.
    """

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype) -> None:
        """Rounds the weights to `dtype` and packs them."""
        super().__init__(layers)
        weight = torch.cat([layer.weight.detach().to(dtype).float() for layer in layers])
        largest = float(weight.abs().max())
        power = 2.0 ** math.floor(math.log2(_HALF_TOP / largest)) if 0 < largest < math.inf else 1.0
        # The kernel would make numbers of weights that are none: all outputs are none instead.
        self.shrink = 1 / power if largest < math.inf else math.nan
        weight = weight.nan_to_num(0, 0, 0)
        self.kernel = torch.ops.quantized.linear_prepack_fp16(weight * power, self.bias)
        self.dtype = dtype
        self.n_bytes = 2 * weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """What the layers give for features (…, in_features), side by side."""
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x * self.shrink, self.kernel)
        return y

    def rows(self) -> Tensor:
        """A copy in the format that they were rounded to."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self.kernel)[0]
        return weight.mul_(self.shrink).to(self.dtype)


class BFloat16Linear(Packed):
    """Linear layers in bf16 for CPUs that multiply it, their weights in oneDNN's order."""

    rounds = True

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Rounds the weights and puts them in that order."""
        super().__init__(layers)
        weight = torch.cat([layer.weight.detach().bfloat16() for layer in layers])
        self.kernel = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED)
        self.n_bytes = weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """What the layers give for features (…, in_features), side by side."""
        return _one_dnn(x.bfloat16(), self.kernel, self.bias).float()

    def rows(self) -> Tensor:
        """A copy in the plain order."""
        weight: Tensor = self.kernel.to_dense()
        return weight


class BlockedLinear(Packed):
    """Linear layers in fp32, their weights in oneDNN's order for products with many rows."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Copies the weights into that order."""
        super().__init__(layers)
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.kernel = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED)
        self.n_bytes = weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """What the layers give for features (…, in_features), side by side."""
        return _one_dnn(x, self.kernel, self.bias)


def _one_dnn(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, kernel, bias, "none", [], "")
    return y


def has_half_kernel() -> bool:
    """Whether torch has the kernel of `HalfLinear` for this CPU."""
    return "fbgemm" in torch.backends.quantized.supported_engines
