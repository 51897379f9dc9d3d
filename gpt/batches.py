"""Shards to batches, each a pure function of (seed, global sample index)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gpt.errors import UserError
from gpt.shards import Split

if TYPE_CHECKING:
    from torch import Tensor

AHEAD = 1024  # samples whose windows are found at once, since numpy costs the same for a few


class Batches:
    """Training batches. An epoch is each window of `context_len` tokens once, in its own order.

    The (N - 1) mod `context_len` tokens that are left over shift the windows: each epoch starts at
    its own offset. What is remembered between calls only saves computing it again.
    """

    def __init__(
        self,
        split: Split,
        context_len: int,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
    ) -> None:
        """Takes the training split; `UserError` where it is shorter than one window.

        Without `shuffle` the windows come in the text's order.
        """
        check_context(split.n_tokens, context_len)
        self._split, self._context_len, self._batch_size = split, context_len, batch_size
        self._seed, self._shuffle = seed, shuffle
        self.n_windows, self._left_over = divmod(split.n_tokens - 1, context_len)
        self._known = range(0)  # samples, and below the first tokens of their windows
        self._places = np.empty(0, np.int64)

    def batch(self, step: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64: the samples step * batch_size + row."""
        first, end = step * self._batch_size, (step + 1) * self._batch_size
        if first < self._known.start or end > self._known.stop:
            epoch_end = -(-end // self.n_windows) * self.n_windows
            self._known = range(first, max(end, min(epoch_end, first + AHEAD)))
            self._places = np.concatenate(list(self._epochs(self._known)))
        starts = self._places[first - self._known.start : end - self._known.start]
        return _to_tensors(self._split, starts if rows is None else starts[rows], self._context_len)

    def epoch(self, step: int) -> float:
        """Passes over the text that are complete before this step."""
        return step * self._batch_size / self.n_windows

    def _epochs(self, samples: range) -> Iterator[npt.NDArray[np.int64]]:
        """First tokens of the samples' windows, an epoch at a time."""
        n = self.n_windows
        for epoch in range(samples.start // n, (samples.stop - 1) // n + 1):
            digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=16).digest()
            key, shift = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
            here = max(samples.start - epoch * n, 0), min(samples.stop - epoch * n, n)
            windows = np.arange(*here, dtype=np.uint64)
            if self._shuffle:
                windows = permute(windows, n, key)
            yield shift % (self._left_over + 1) + windows.astype(np.int64) * self._context_len


def permute(index: npt.NDArray[np.uint64], n: int, key: int) -> npt.NDArray[np.uint64]:
    """Where a permutation of range(n), chosen by a 64-bit key, puts each index; O(1) memory.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains": a Feistel network on
    the next power of four, walked until it falls below n (on average fewer than four times). Its
    rounds are splitmix64's mixer (Steele, Lea, Flood 2014).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64((key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(8)]
    result = index.copy()
    todo = np.arange(len(index))
    while todo.size:
        left, right = result[todo] >> half, result[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[todo] = left << half | right
        todo = todo[result[todo] >= n]
    return result


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def eval_batches(
    split: Split, context_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that do not overlap, as (inputs, targets), each (B, T) int64; the same each time.

    With `max_tokens` null every token but the first is predicted once; the last batch is one
    shorter window where the length asks for it. Else whole windows evenly over the split, at least
    one, at most `max_tokens` tokens together.
    """
    n_windows, left_over = divmod(split.n_tokens - 1, context_len)
    if max_tokens is None or max_tokens >= split.n_tokens - 1:
        chosen = range(n_windows)
    else:
        wanted = min(n_windows, max(1, max_tokens // context_len))
        chosen, left_over = range(wanted), left_over if n_windows == 0 else 0
    step = n_windows / len(chosen) if chosen else 0
    starts = np.array([int((i + 0.5) * step) * context_len for i in chosen], np.int64)
    for first in range(0, len(starts), batch_size):
        yield _to_tensors(split, starts[first : first + batch_size], context_len)
    if left_over:
        yield _to_tensors(split, np.array([n_windows * context_len]), left_over)


def _to_tensors(split: Split, starts: npt.NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
    import torch  # here: text becomes shards without it, and it takes seconds

    rows = split.windows(starts, length + 1).astype(np.int64)
    windows = torch.from_numpy(rows)  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def check_context(n_tokens: int, context_len: int) -> None:
    """Refuses a training split that is shorter than one window and its last target."""
    if n_tokens < context_len + 1:
        raise UserError(
            f"model.context_len {context_len}: the training split has {n_tokens} tokens, and needs "
            f"at least {context_len + 1}; lower it to {max(1, n_tokens - 1)} or less, "
            "or give more text"
        )
