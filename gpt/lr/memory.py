"""What a training step will hold in memory, from a rehearsal with tensors that have no numbers.

The rehearsal runs the model's own forward and backward pass on fake tensors, which have a shape
and a size but no memory, and follows every one from its birth to its end. Nothing is allocated, a
model of a billion parameters takes seconds. Compiled models fuse operations and hold less.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.config import Config
from gpt.device import autocast
from gpt.gauges import sample_size
from gpt.model import GPT
from gpt.optim import parameter_groups
from gpt.step import loss_sum

REHEARSED_LAYERS = 2
# What a training process on a CPU holds beside its tensors, whatever their size: Python and torch
# 0.25 GB, the matrix products' own buffers 0.04 GB, the rest probably holes in the heap.
# Measured with glibc and two threads at 0.5, 0.8 and 2.4 GB of tensors: within 3 % of the peak.
PROCESS_BYTES = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, by what they are for.

    `activations` is the most that forward and backward pass hold besides weights and optimizer
    state, with the gradients as far as they are there by then; `update` what the update itself
    adds, where it measures how far the weights move. The parts are not all there at once: `total`
    is the highest moment of a step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int

    @property
    def total(self) -> int:
        """The most bytes held at any moment of a step."""
        resting = self.weights + self.optimizer
        return resting + max(self.activations, self.gradients + self.update)

    @property
    def process(self) -> int:
        """The most that a process on a CPU holds, as the system counts it: tensors and all else."""
        return self.total + PROCESS_BYTES


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows the storages that operations create; `peak` is the most at once."""

    def __init__(self) -> None:
        """Starts at nothing: what was there before is not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leaves out storages that were there before, and may come back from an operation."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (torch's own signature)
        if func is torch.ops.prim.device.default:  # what most calls ask for, and the longest way
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:  # sparse: of such ones
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def estimate_memory(config: Config, vocab_size: int, dtype: torch.dtype) -> Memory:
    """The memory of a step after the first, when the optimizer's state is there.

    `dtype` is the format of the matrix products, as chosen for the device. Each layer adds the
    same: a deep model's memory is extrapolated from those of few layers.
    """
    more = config.model.n_layer - REHEARSED_LAYERS
    if more <= 1:
        return _estimate(config, vocab_size, dtype)
    few, one_more = (
        _estimate(_with_layers(config, REHEARSED_LAYERS + extra), vocab_size, dtype)
        for extra in (0, 1)
    )
    pairs = zip(astuple(few), astuple(one_more), strict=True)
    return Memory(*(before + more * (after - before) for before, after in pairs))


def _with_layers(config: Config, n_layer: int) -> Config:
    model = config.model.model_copy(update={"n_layer": n_layer})
    return config.model_copy(update={"model": model})


def _estimate(config: Config, vocab_size: int, dtype: torch.dtype) -> Memory:
    with FakeTensorMode(), torch.device("cpu"):
        model = GPT(config.model, vocab_size)
        model.train()
        model.recompute = config.train.activation_checkpointing
        parameters = list(model.parameters())
        weights = sum(size_of(tensor) for tensor in [*parameters, *model.buffers()])
        gradients = sum(size_of(parameter) for parameter in parameters)
        activations = _rehearse(model, config, vocab_size, dtype)
        optimizer = optimizer_bytes(model, config)
        update = update_bytes(model, config)
    return Memory(weights, gradients, optimizer, activations, update)


def _rehearse(model: GPT, config: Config, vocab_size: int, dtype: torch.dtype) -> int:
    """The most bytes at once while the batch goes forward and back, weights left out."""
    device, train = torch.device("cpu"), config.train
    batch, size = train.batch_size, train.micro_batch_size or train.batch_size
    rows = torch.zeros(batch, config.model.context_len, dtype=torch.int64)
    targets = torch.zeros_like(rows)
    there = [rows, targets]
    if size < batch:  # from the second micro-batch on, the gradients of the earlier ones
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            there.append(parameter.grad)
    live = LiveBytes()
    live.ignore([*model.parameters(), *model.buffers(), *there])
    with live:
        with autocast(device, dtype):
            loss = loss_sum(model, rows[:size], targets[:size], gradient=1 / targets.numel())
        (loss / targets.numel()).backward()  # type: ignore[no-untyped-call]
    return live.peak + sum(size_of(tensor) for tensor in there)


def optimizer_bytes(model: nn.Module, config: Config) -> int:
    """The state that the optimizer keeps between steps.

    Adam has two averages of each weight, Muon and SGD one; Adafactor, for a matrix, one of each
    row and one of each column.
    """
    optimizer = config.optimizer
    total = 0
    for group in parameter_groups(model, optimizer):
        for weight in group["params"]:
            hidden = group["name"] == "matrices"
            match optimizer.name:
                case "adam" | "adamw":
                    total += 2 * size_of(weight)
                case "muon":
                    total += (1 if hidden else 2) * size_of(weight)
                case "sgd":
                    total += size_of(weight) if optimizer.momentum else 0
                case "adafactor" if weight.ndim > 1:
                    rows, columns = weight.shape[-2:]
                    total += size_of(weight) * (rows + columns) // (rows * columns)
                case "adafactor":
                    total += size_of(weight)
    return total


def update_bytes(model: nn.Module, config: Config) -> int:
    """What comes and goes while the weights are updated.

    A step that is logged keeps samples of the weights and the gradient, and then how far each has
    moved. Muon on a CPU holds the hidden matrices' updates at once, and some copies of those of one
    shape; Adafactor the update of one tensor.
    """
    name = config.optimizer.name
    sample = sum(4 * sample_size(parameter) for parameter in model.parameters())
    if name == "adafactor":
        return max(4 * sample, 2 * sample + max(size_of(weight) for weight in model.parameters()))
    adams, by_shape = 0, dict[torch.Size, int]()
    for group in parameter_groups(model, config.optimizer):
        for weight in group["params"]:
            if name == "muon" and group["name"] == "matrices":
                by_shape[weight.shape] = by_shape.get(weight.shape, 0) + size_of(weight)
            elif name in ("adam", "adamw", "muon"):
                adams += 4 * sample_size(weight)
    measured = 4 * sample + 3 * adams  # those of g^2 / v
    if not by_shape:
        return measured
    hidden = sum(by_shape.values()) + 5 * max(by_shape.values())
    return max(measured, 2 * sample + hidden)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()
