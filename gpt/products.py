"""Matrix times one vector, from a fixed vector to a fixed vector, the quickest way for its format.

Memory and cores are the limit, then the start of each operation: NumPy starts in a microsecond,
torch in five, and both work on the same memory.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gpt.packed import FINER, LARGEST, OUTLIER, Int8Linear, Packed, Part
from gpt.pages import empty

Floats = npt.NDArray[np.float32]


class VectorProduct(Protocol):
    """Layers that read one vector x and write one vector y."""

    def set(self, scale: float) -> None:
        """Makes y the outputs for scale·x, shifted as the norm before the layers shifts it."""

    def add(self) -> None:
        """Adds the outputs for x to y."""


def product(
    layers: list[nn.Module],
    x: Floats,
    y: Floats,
    norm: nn.Module | None = None,
    *,
    factor: float = 1.0,
) -> VectorProduct:
    """The product of layers with the vector they read, into the one for their outputs together.

    All outputs are multiplied by `factor`. `norm` stands before the layers: its shift is added to
    the scaled vector where it has one. The first of layers that are packed together brings all.
    """
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linear) == len(layers):
        return Product(linear, x, y, norm, factor=factor)
    packed = layers[0].whole if isinstance(layers[0], Part) else layers[0]
    assert isinstance(packed, Packed)
    assert sum(packed.sizes) == len(y)
    shift = _shift(norm)
    if isinstance(packed, Int8Linear):
        return Int8Product(packed, x, y, shift, factor=factor)
    return PackedProduct(packed, x, y, shift, factor=factor)


class Product:
    """In fp32. A plain product with one vector runs on one core; this one on all.

    Cut into blocks of rows, which are views, it is a batch of products, and all cores share a
    batch. Several layers are copied into one.
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        x: Floats,
        y: Floats,
        norm: nn.Module | None = None,
        *,
        factor: float = 1.0,
    ) -> None:
        """As `product` has it; the norm's shift becomes part of the bias."""
        weights = [layer.weight.detach() for layer in layers]
        weight = _joined(weights) if len(weights) > 1 else weights[0]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        shift = _shift(norm)
        if shift is not None:
            moved = weight @ torch.from_numpy(shift)
            bias = moved if bias is None else bias + moved
        self.factor = factor
        self.bias: Floats | None = None if bias is None else (bias * factor).numpy()
        rows, width = weight.shape
        blocks = torch.get_num_threads()  # one each: measured, finer ones are slower
        even = rows - rows % blocks
        self.x, self.y, y_there = torch.from_numpy(x), y, torch.from_numpy(y)
        self.blocks = weight[:even].view(blocks, -1, width).mT  # (blocks, in_features, rows)
        self.block_x = self.x.expand(blocks, 1, width)
        self.block_y = y_there[:even].view(blocks, 1, -1)
        self.rest, self.rest_y = weight[even:], y_there[even:]

    def set(self, scale: float) -> None:
        """Makes y the outputs for scale·x."""
        if self.bias is None:
            self._multiply(0, scale)
        else:
            np.copyto(self.y, self.bias)
            self._multiply(1, scale)

    def add(self) -> None:
        """Adds the outputs to y."""
        if self.bias is not None:
            self.y += self.bias
        self._multiply(1, 1.0)

    def _multiply(self, beta: int, scale: float) -> None:
        alpha = scale * self.factor
        self.block_y.baddbmm_(self.block_x, self.blocks, beta=beta, alpha=alpha)
        if len(self.rest):
            self.rest_y.addmv_(self.rest, self.x, beta=beta, alpha=alpha)


class Int8Product:
    """In int8, as `Int8Linear.forward` calculates it for one row."""

    def __init__(
        self, layer: Int8Linear, x: Floats, y: Floats, shift: Floats | None, *, factor: float
    ) -> None:
        """As `product` has it."""
        self.x, self.y, self.shift = x, y, shift
        self.step = (layer.step * factor).numpy()
        self.bias = None if layer.bias is None else (layer.bias * factor).numpy()
        self.weight = layer.whole.mT
        self.scaled, self.rounded = np.zeros_like(x), np.zeros_like(x)
        self.vector = torch.zeros(1, len(x), dtype=torch.int8)
        self.whole = self.vector.numpy()[0]
        self.sums = torch.zeros(1, len(y), dtype=torch.int32)
        self.out, self.part = np.zeros_like(y), np.zeros_like(y)

    def set(self, scale: float) -> None:
        """Makes y the outputs for scale·x and the shift."""
        self._multiply(scale)
        if self.bias is None:
            np.copyto(self.y, self.out)
        else:
            np.add(self.out, self.bias, out=self.y)

    def add(self) -> None:
        """Adds the outputs for x to y."""
        self._multiply(1.0)
        self.y += self.out
        if self.bias is not None:
            self.y += self.bias

    def _multiply(self, scale: float) -> None:
        x = self.x
        if self.shift is not None:
            x = np.multiply(x, scale, out=self.scaled)
            x += self.shift
            scale = 1.0
        largest = max(float(np.maximum.reduce(x)), -float(np.minimum.reduce(x)), 1e-30)
        scaled = np.multiply(x, LARGEST / largest, out=self.scaled)
        np.rint(scaled, out=self.rounded)
        self._sums(self.rounded, self.out)
        if float(np.dot(scaled, scaled)) < len(x) * (LARGEST / OUTLIER) ** 2:
            scaled -= self.rounded
            scaled *= FINER
            self._sums(np.rint(scaled, out=scaled), self.part)
            self.part *= 1 / FINER
            self.out += self.part
        self.out *= self.step
        self.out *= scale * (largest / LARGEST)

    def _sums(self, rounded: Floats, out: Floats) -> None:
        np.copyto(self.whole, rounded, casting="unsafe")
        torch._int_mm(self.vector, self.weight, out=self.sums)
        np.copyto(out, self.sums.numpy()[0], casting="unsafe")


class PackedProduct:
    """In bf16 or fp16: what the packed layers give for a batch of one row."""

    def __init__(
        self, layer: Packed, x: Floats, y: Floats, shift: Floats | None, *, factor: float
    ) -> None:
        """As `product` has it."""
        self.layer, self.x, self.y, self.shift, self.factor = layer, x, y, shift, factor
        self.vector = torch.zeros(1, len(x))
        self.scaled = self.vector.numpy()[0]

    def set(self, scale: float) -> None:
        """Makes y the outputs for scale·x and the shift."""
        np.copyto(self.y, self._outputs(scale))

    def add(self) -> None:
        """Adds the outputs for x to y."""
        self.y += self._outputs(1.0)

    def _outputs(self, scale: float) -> Floats:
        np.multiply(self.x, scale, out=self.scaled)
        if self.shift is not None:
            self.scaled += self.shift
        outputs: Floats = self.layer(self.vector).numpy()[0]
        if self.factor != 1:
            outputs *= self.factor
        return outputs


def _joined(weights: list[Tensor]) -> Tensor:
    """The rows of all, one after the other."""
    there = empty(sum(weight.numel() for weight in weights)).view(-1, weights[0].size(1))
    return torch.cat(weights, out=there)


def _shift(norm: nn.Module | None) -> Floats | None:
    """What a norm adds after scaling, as NumPy sees it."""
    bias = getattr(norm, "bias", None)
    if not isinstance(bias, Tensor):
        return None
    shift: Floats = bias.detach().numpy()
    return shift
