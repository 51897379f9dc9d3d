"""From the tokens so far to the logits of the next: prefill, one step. Draws nothing."""

import copy
from collections.abc import Sequence
from ctypes import CDLL
from functools import cached_property

import torch
from torch import Tensor, nn

from gpt.clibrary import c_library
from gpt.kvcache import KVCache
from gpt.model import GPT
from gpt.onerow import OneRow, is_unrolled
from gpt.onerow_c import OneRowC
from gpt.quantize import linear_bytes, pack

__all__ = ["Decoder", "KVCache", "OneRow", "prefill"]

# Of prompts in one row: enough for products at full speed, and a bound on their features.
TOKENS_TOGETHER = 4096
# Below, the plain products of a few rows are as quick.
BLOCKED_FROM_ROWS = 8
MOST_BLOCKED_BYTES = 2 * 2**30


def prefill(model: GPT, cache: KVCache, rows: Sequence[list[int]]) -> None:
    """Encodes all but the newest token of each row; samples of one prompt share the work.

    The newest token is left to the first step of decoding. Nothing is padded: prompts follow each
    other as one long row, up to a number of tokens whose features stay small.
    """
    first_with: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(rows):
        first_with.setdefault(tuple(ids), index)
    together: dict[int, list[int]] = {}
    most = 0 if model.config.ngram > 1 else TOKENS_TOGETHER
    for prompt, index in first_with.items():
        if together and sum(map(len, together.values())) + len(prompt) > most:
            cache.fill_rows(model, together)
            together = {}
        together[index] = list(prompt[:-1])
    cache.fill_rows(model, together)
    for index, ids in enumerate(rows):
        if first_with[tuple(ids)] != index:
            cache.copy(first_with[tuple(ids)], index)


class Decoder:
    """A model in evaluation mode that continues rows; shares the model's weights and not its mode.

    Prepare anew after the weights have changed: a copy of some of them is kept.
    """

    def __init__(self, model: GPT) -> None:
        """Takes the model; one row on a CPU, not in plain halves, gets the quick step."""
        shared = (*model.parameters(), *model.buffers())
        self.model = copy.deepcopy(model, memo={id(one): one for one in shared}).eval()
        weight = model.final_norm.weight
        quick = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._unrolled = quick and is_unrolled(model.config)
        self.blocks_pay = quick and isinstance(model.head, nn.Linear) and blocks_pay(model)
        self._blocked: GPT | None = None
        self.slower_because = ""  # why one row is not calculated in C, once it has been

    @cached_property
    def one_row(self) -> OneRow | OneRowC | None:
        """The quick step for one row, where there is one: in C if a compiler made it."""
        if not self._unrolled:
            return None
        library = c_library("decode")
        if isinstance(library, CDLL):
            return OneRowC(self.model)
        self.slower_because = library
        return OneRow(self.model)

    def model_for(self, rows: int) -> GPT:
        """The model to use with so many rows: from some on, a copy in an order that suits them."""
        if rows < BLOCKED_FROM_ROWS or not self.blocks_pay:
            return self.model
        if self._blocked is None:
            self._blocked = pack(self.model, torch.float32)
        return self._blocked

    def next_logits(self, newest: list[int], cache: KVCache) -> Tensor:
        """Appends the newest token of each row; gives the logits (B, V) of the one after it.

        To be called in inference mode. The logits may be overwritten by the next call.
        """
        if len(newest) == 1 and self.one_row is not None:
            return self.one_row(newest[0], cache)
        model = self.model_for(len(newest))
        ids = torch.tensor(newest, device=cache.k[0].device)[:, None]  # (B, T = 1)
        logits: Tensor = model(ids, cache.next_token())[:, -1]  # (B, V)
        return logits


def blocks_pay(model: GPT) -> bool:
    """Whether oneDNN is there, and a second copy of the weights is small enough to be kept."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and linear_bytes(model) <= MOST_BLOCKED_BYTES
