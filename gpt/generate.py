"""Text from a model: batches of prompts, the loop, stop rules. Prints nothing it makes.

A row is one sample of one prompt. What a row gives depends on its prompt, the settings and the
number of its sample, never on the rows beside it. In fp32 this holds to the token, as long as no
two candidates are within rounding error of each other.
"""

import codecs
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from gpt.decode import Decoder, KVCache, prefill
from gpt.errors import UserError, say
from gpt.model import GPT
from gpt.sampling import Sampling, choose
from gpt.tokenizer import Tokenizer

__all__ = ["Completion", "Piece", "Sampling", "complete", "generate"]

FinishReason = Literal["length", "stop", "end"]

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Completion:
    """A finished row."""

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Piece:
    """A bit of text of one row, as soon as it is certain; `completion` comes with the last."""

    prompt_index: int
    sample: int
    text: str
    completion: Completion | None


def complete(
    model: GPT | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    samples: int = 1,
) -> list[Completion]:
    """All completions: the samples of the first prompt, then those of the second, and so on."""
    done = {
        (piece.prompt_index, piece.sample): piece.completion
        for piece in generate(model, tokenizer, prompts, sampling, samples)
        if piece.completion is not None
    }
    return [done[key] for key in sorted(done)]


def generate(
    model: GPT | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    samples: int = 1,
) -> Iterator[Piece]:
    """Continues each prompt `samples` times; gives the pieces of all rows as they come.

    An empty prompt begins a new document. Of a prompt longer than the context the newest tokens
    count. The model's mode and torch's random state stay as they are. A decoder, prepared once,
    spares each call the preparation.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: must be >= 1")
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    context_len = decoder.model.config.context_len
    encoded = [encode_prompt(tokenizer, prompt, context_len) for prompt in prompts]
    rows = (  # made when their turn comes: nobody waits for, or keeps, a million samples
        Row(tokenizer, prompt, ids, sampling, seed, (index, n))
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
        for n in range(samples)
    )
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield from _run(decoder, batch, sampling)


def encode_prompt(tokenizer: Tokenizer, prompt: str, context_len: int) -> list[int]:
    """The prompt's ids, at least one and at most a context; says so if the oldest are dropped."""
    encoded = tokenizer.encode(prompt)
    if len(encoded) > context_len:
        say(
            f"note: the prompt has {len(encoded)} tokens, the model sees {context_len}; "
            f"the oldest {len(encoded) - context_len} are left out"
        )
    ids: list[int] = encoded[-context_len:].tolist()
    return ids or [tokenizer.eot_id]


@torch.inference_mode()
def _run(decoder: Decoder, rows: list["Row"], sampling: Sampling) -> Iterator[Piece]:
    """Decodes some rows together, a token each at a time; finished rows leave the cache."""
    model = decoder.model_for(len(rows))
    context_len = model.config.context_len
    longest = max(len(row.ids) for row in rows) + sampling.max_tokens
    cache = KVCache(model, len(rows), min(longest, context_len))
    prefill(model, cache, [row.ids for row in rows])
    while rows:
        for index, row in enumerate(rows):
            if row.window_len > context_len:
                row.slide(context_len)
                cache.fill(model, index, row.window[:-1])
        logits = decoder.next_logits([row.ids[-1] for row in rows], cache)  # (B, V)
        draws = [row.random.random() for row in rows]
        occurred = [row.ids for row in rows]
        for row, token in zip(rows, choose(logits, sampling, draws, occurred), strict=True):
            piece = row.take(token)
            if piece.text or piece.completion:
                yield piece
        going_on = [index for index, row in enumerate(rows) if not row.finished]
        if len(going_on) < len(rows):
            rows = [rows[index] for index in going_on]
            cache.keep(going_on)


class Row:
    """One sample of one prompt on its way: its tokens, its random numbers, its text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        ids: list[int],
        sampling: Sampling,
        seed: int,
        key: tuple[int, int],
    ) -> None:
        """Takes the prompt and its ids; `key` is the prompt's index and the sample's number."""
        self.tokenizer, self.prompt, self.sampling, self.key = tokenizer, prompt, sampling, key
        self.ids = list(ids)
        self.start = 0  # first token of the window that the model sees
        self.random = random.Random(f"{seed}/{key[1]}")
        self.tokens: list[int] = []
        self.text = TextStream(sampling.stop)
        self.finished = False

    @property
    def window(self) -> list[int]:
        """The tokens that the model sees."""
        return self.ids[self.start :]

    @property
    def window_len(self) -> int:
        """How many tokens the model sees."""
        return len(self.ids) - self.start

    def slide(self, context_len: int) -> None:
        """Makes room: the oldest quarter of the context is forgotten.

        The rest is encoded anew at new positions, so the model sees what it would see without a
        cache. A quarter at a time keeps that rare; one token at a time would pay for it each time.
        """
        self.start += max(1, context_len // 4)

    def take(self, token: int) -> Piece:
        """Adds a token; gives the text that is certain by now."""
        reason: FinishReason | None = None
        if token == self.tokenizer.eot_id:
            text, reason = self.text.finish(), "end"
        else:
            self.ids.append(token)
            self.tokens.append(token)
            text = self.text.feed(self.tokenizer.token_bytes(token))
            if self.text.stopped:
                reason = "stop"
            elif len(self.tokens) == self.sampling.max_tokens:
                text, reason = text + self.text.finish(), "length"
        completion = None
        if reason is not None:
            self.finished = True
            completion = Completion(self.prompt, self.text.given, self.tokens, reason)
        return Piece(*self.key, text, completion)


class TextStream:
    """Bytes in, text out as soon as it is certain: whole characters, and no part of a stop text."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Takes the texts that end the stream."""
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.given = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Text that became certain with these bytes; ends before the first stop text."""
        self._held += self._decoder.decode(data)
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._give(min(found))
        return self._give(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """What was held back, at the end; the first bytes of a character cut in half are lost."""
        return self._give(len(self._held))

    def _doubtful(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self.given += text
        return text
