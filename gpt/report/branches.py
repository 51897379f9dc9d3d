"""Branches of a run: what it would do from one of its checkpoints on, trained in memory.

Which checkpoint that is is `origin`'s business; what the branches show is judged in `limits`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.batches import Batches, eval_batches
from gpt.checkpoint import Training
from gpt.data import TokenData
from gpt.device import autocast, rng_state, set_rng_state
from gpt.history import Column
from gpt.plan import Plan
from gpt.step import NonFiniteError, cross_entropy_sum, train_step

MIN_BLOCKS = 20  # a standard error over fewer blocks of the text is a guess
_MAX_SKIPS = 32  # fp16: its scale comes down by half each time


@dataclass(frozen=True)
class Losses:
    """Validation losses: nats summed over each block of the text, and the blocks' tokens."""

    sums: Column
    tokens: Column

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Difference:
    """A difference of losses in nats per token, and its standard error."""

    value: float
    error: float

    def is_above(self, least: float = 0.0) -> bool:
        """Whether it is more than twice its standard error above `least`."""
        return self.value - least > 2 * self.error

    def with_noise(self, noise: float) -> "Difference":
        """The same with the standard error of something independent in it."""
        return Difference(self.value, math.hypot(self.error, noise))

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.error:.4f}"


def drop(before: Losses, after: Losses) -> Difference:
    """How far the loss fell on the same blocks; its error is what other text would change.

    The blocks are paired and weighted by their tokens.
    """
    return _mean_of_blocks(before.sums - after.sums, before.tokens)


def mean_loss(losses: Losses) -> Difference:
    """The loss itself, with its standard error over the blocks."""
    return _mean_of_blocks(losses.sums, losses.tokens)


def _mean_of_blocks(sums: Column, tokens: Column) -> Difference:
    count, total = len(tokens), float(tokens.sum())
    value = float(sums.sum()) / total
    if count < 2:
        return Difference(value, math.inf)
    spread = float(((sums - value * tokens) ** 2).sum())
    return Difference(value, math.sqrt(spread * count / (count - 1)) / total)


@dataclass(frozen=True)
class Branch:
    """Steps trained on from the checkpoint: the loss of each, and the validation loss at the end.

    `val` is None where the numbers broke on the way.
    """

    losses: tuple[float, ...]
    val: Losses | None


@dataclass(frozen=True)
class _Moment:
    """A training's whole state, on the CPU; nothing changes it afterwards."""

    weights: list[Tensor]
    optimizer: list[dict[str, Any]]
    scaler: dict[str, Any]
    rng: dict[str, Tensor]


class Bench:
    """A run at one of its checkpoints, from which branches are trained, each from the same state.

    torch's generators are used and not put back. `rates` are those of the optimizer's groups for
    the checkpoint's next step, `next_batch` is the batch that this step takes.
    """

    def __init__(self, folder: Path, training: Training, data: TokenData, plan: Plan) -> None:
        """Takes a training in the state of the checkpoint at `folder`."""
        self.folder, self.plan, self.data, self.config = folder, plan, data, training.config
        self.step = training.progress.step
        self.rates = [float(group["lr"]) for group in training.optimizer.param_groups]
        self.val_tokens = min(data.val.n_tokens - 1, self.config.eval.max_tokens or 2**62)
        self._training = training
        self._parameters = list(training.model.parameters())
        self._device = self._parameters[0].device
        self._batches = Batches(
            data.train,
            self.config.model.context_len,
            self.config.train.batch_size,
            self.config.run.seed,
            shuffle=self.config.data.shuffle,
        )
        self.next_batch = self.step + training.progress.skipped_batches
        self._start = self._moment()

    @property
    def epochs(self) -> float:
        """Passes over the training text that the run had made."""
        return self._batches.epoch(self.next_batch)

    def branch(
        self,
        factors: Sequence[float],
        on_step: Callable[[], None],
        on_tokens: Callable[[int], None],
    ) -> Branch:
        """Takes one step for each factor of the checkpoint's rates, then validates.

        Every branch sees the same batches and draws the same random numbers.
        """
        self._go_back()
        losses = self._train(factors, on_step)
        if len(losses) < len(factors):
            return Branch(losses, None)
        val = self.validate(on_tokens)
        return Branch(losses, val if math.isfinite(val.mean) else None)

    @torch.no_grad()
    def validate(self, on_tokens: Callable[[int], None]) -> Losses:
        """The run's validation loss, block by block; draws no random number."""
        model = self._training.model
        sums, tokens = [], []
        model.eval()
        for inputs, targets in eval_batches(
            self.data.val,
            self.config.model.context_len,
            self._block_windows(),
            self.config.eval.max_tokens,
        ):
            with autocast(self._device, self._training.dtype):
                logits = model(inputs.to(self._device))
            sums.append(float(cross_entropy_sum(logits, targets.to(self._device))))
            tokens.append(targets.numel())
            on_tokens(targets.numel())
        return Losses(np.array(sums, float), np.array(tokens, float))

    def _block_windows(self) -> int:
        """Windows in a block: as many as the run takes at a time, or fewer for enough blocks."""
        train = self.config.train
        windows = self.val_tokens // self.config.model.context_len
        return max(1, min(train.micro_batch_size or train.batch_size, windows // MIN_BLOCKS))

    def _train(self, factors: Sequence[float], on_step: Callable[[], None]) -> tuple[float, ...]:
        """The losses of the steps; fewer than factors where the numbers broke."""
        losses: list[float] = []
        skips = 0
        while len(losses) < len(factors):
            for group, rate in zip(self._training.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factors[len(losses)]
            inputs, targets = self._batches.batch(self.next_batch + len(losses))
            try:
                result = train_step(self._training, inputs, targets)
            except NonFiniteError:
                break
            if result.skipped and skips < _MAX_SKIPS:
                skips += 1
                continue
            losses.append(result.loss)
            on_step()
        return tuple(losses)

    def _moment(self) -> _Moment:
        state = self._training.optimizer.state
        return _Moment(
            weights=[_copy(parameter) for parameter in self._parameters],
            optimizer=[
                {key: _copy(value) for key, value in state.get(parameter, {}).items()}
                for parameter in self._parameters
            ],
            scaler=dict(self._training.scaler.state_dict()),
            rng=rng_state(),
        )

    @torch.no_grad()
    def _go_back(self) -> None:
        """Puts the checkpoint's state back, to the last bit."""
        for parameter, weight, saved in zip(
            self._parameters, self._start.weights, self._start.optimizer, strict=True
        ):
            parameter.copy_(weight)
            current = self._training.optimizer.state[parameter]
            for key in current.keys() - saved.keys():
                del current[key]
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    current[key].copy_(value)
                else:
                    current[key] = value
        self._training.scaler.load_state_dict(self._start.scaler)
        set_rng_state(self._start.rng)


def _copy(value: Any) -> Any:  # noqa: ANN401 (an optimizer's state holds anything)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
