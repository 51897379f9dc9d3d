"""Text from a model: KV cache, sampling, batches of prompts, stop rules. Prints nothing it makes.

A row is one sample of one prompt. What a row gives depends on its prompt, the settings and the
number of its sample, never on the rows beside it. In fp32 this holds to the token, as long as no
two candidates are within rounding error of each other.
"""

import codecs
import copy
import math
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.errors import UserError, say
from gpt.model import GPT, Attention, Block
from gpt.tokenizer import Tokenizer

FinishReason = Literal["length", "stop", "end"]

ROWS_AT_ONCE = 16
# Candidates looked at first by top-p; the whole vocabulary is sorted only if they hold too little.
TOP_P_CANDIDATES = 1024
# Below so many weights, the second core costs more than it brings.
SPLIT_MIN_WEIGHTS = 2**16


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises UserError, with all mistakes at once."""

    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only; None or more than there are: among all."""
    top_p: float | None = None
    """Draw among the fewest tokens that hold this much probability, in (0, 1]."""
    min_p: float | None = None
    """Draw among tokens at least this share as likely as the likeliest, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred, multiplies negative ones; 1: off."""
    seed: int | None = None
    """Sample n of a seed is always the same; None: different each time."""
    max_tokens: int = 200
    """Tokens to generate at most."""
    stop: tuple[str, ...] = ()
    """Texts that end a row; they are not part of what it gives."""

    def __post_init__(self) -> None:
        """Checks every value."""
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature {self.temperature}: must be a number >= 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top-k {self.top_k}: must be >= 1; leave it out for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top-p {self.top_p}: must be above 0 and at most 1; 1 is no limit")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(f"min-p {self.min_p}: must be from 0 to 1; 0 is no limit")
        if not 0 < self.repetition_penalty < math.inf:
            value = self.repetition_penalty
            problems.append(f"repetition-penalty {value}: must be a number above 0; 1 is none")
        if self.seed is not None and self.seed < 0:
            problems.append(f"seed {self.seed}: must be >= 0; leave it out for a random one")
        if self.max_tokens < 1:
            problems.append(f"max-tokens {self.max_tokens}: must be >= 1; 200 is the default")
        if "" in self.stop:
            problems.append("stop '': an empty text would stop at once; give at least a character")
        if problems:
            raise UserError(*problems)


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
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, samples: int = 1
) -> list[Completion]:
    """All completions: the samples of the first prompt, then those of the second, and so on."""
    done = {
        (piece.prompt_index, piece.sample): piece.completion
        for piece in generate(model, tokenizer, prompts, sampling, samples)
        if piece.completion is not None
    }
    return [done[key] for key in sorted(done)]


def generate(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, samples: int = 1
) -> Iterator[Piece]:
    """Continues each prompt `samples` times; gives the pieces of all rows as they come.

    An empty prompt begins a new document. Of a prompt longer than the context the newest tokens
    count. The model's mode and torch's random state stay as they are.
    """
    if samples < 1:
        raise UserError(f"samples {samples}: must be >= 1")
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    rows = []
    for index, prompt in enumerate(prompts):
        ids = encode_prompt(tokenizer, prompt, model.config.context_len)
        rows += [Row(tokenizer, prompt, ids, sampling, seed, (index, n)) for n in range(samples)]
    decoder = prepare_for_decode(model)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield from _run(decoder, rows[first : first + ROWS_AT_ONCE], sampling)


def encode_prompt(tokenizer: Tokenizer, prompt: str, context_len: int) -> list[int]:
    """The prompt's ids, at least one and at most a context; says so if the oldest are dropped."""
    ids: list[int] = tokenizer.encode(prompt).tolist() or [tokenizer.eot_id]
    if len(ids) > context_len:
        say(
            f"note: the prompt has {len(ids)} tokens, the model sees {context_len}; "
            f"the oldest {len(ids) - context_len} are left out"
        )
    return ids[-context_len:]


@torch.inference_mode()
def _run(model: GPT, rows: list["Row"], sampling: Sampling) -> Iterator[Piece]:
    """Decodes some rows together, a token each at a time; finished rows leave the cache."""
    context_len = model.config.context_len
    longest = max(len(row.ids) for row in rows) + sampling.max_tokens
    cache = KVCache(model, len(rows), min(longest, context_len))
    prefill(model, cache, rows)
    while rows:
        for index, row in enumerate(rows):
            if len(row.window) > context_len:
                row.slide(context_len)
                cache.fill(model, index, row.window[:-1])
        newest = torch.tensor([[row.ids[-1]] for row in rows], device=model.tok_emb.weight.device)
        logits = model(newest, cache.next_token())[:, -1]  # (B, V)
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


class KVCache:
    """Keys and values of B rows, each row as long as it is; room for `size` tokens a row."""

    def __init__(self, model: GPT, rows: int, size: int) -> None:
        """Reserves the memory; zeros, because what is masked must still be finite."""
        config, like = model.config, model.tok_emb.weight
        shape = (rows, config.kv_heads, size, config.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.v = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.lengths = [0] * rows

    def fill(self, model: GPT, row: int, ids: list[int]) -> None:
        """Encodes a row's tokens from position 0 on, in place of what it held."""
        self.lengths[row] = len(ids)
        if ids:
            device = model.tok_emb.weight.device
            model.features(torch.tensor([ids], device=device), _Fill(self, row, len(ids)))

    def copy(self, source: int, target: int) -> None:
        """Gives one row what another holds."""
        for store in (*self.k, *self.v):
            store[target] = store[source]
        self.lengths[target] = self.lengths[source]

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.k = [store[rows] for store in self.k]
        self.v = [store[rows] for store in self.v]
        self.lengths = [self.lengths[row] for row in rows]

    def next_token(self) -> "_NextToken | _NextTokenRagged":
        """The cache as the model needs it to append one token to each row."""
        same = len(set(self.lengths)) == 1
        step = _NextToken(self) if same else _NextTokenRagged(self)
        self.lengths = [length + 1 for length in self.lengths]
        return step


class _Fill:
    """Writes the first tokens of one row."""

    mask = None

    def __init__(self, cache: KVCache, row: int, length: int) -> None:
        self.cache, self.row, self.length = cache, row, length
        self.positions = torch.arange(length, device=cache.k[0].device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.cache.k[layer][self.row, :, : self.length] = k[0]
        self.cache.v[layer][self.row, :, : self.length] = v[0]
        return k, v


class _NextToken:
    """Appends one token to rows of one length: nothing to mask, nothing to look up."""

    mask = None

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.at = cache, cache.lengths[0]
        self.positions = torch.tensor([self.at], device=cache.k[0].device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, at = self.cache.k[layer], self.cache.v[layer], self.at
        keys[:, :, at : at + 1] = k
        values[:, :, at : at + 1] = v
        return keys[:, :, : at + 1], values[:, :, : at + 1]


class _NextTokenRagged:
    """Appends one token to rows of different lengths."""

    def __init__(self, cache: KVCache) -> None:
        device = cache.k[0].device
        self.cache, self.used = cache, max(cache.lengths) + 1
        self.rows = torch.arange(len(cache.lengths), device=device)
        self.at = torch.tensor(cache.lengths, device=device)  # (B,)
        self.positions = self.at[:, None]  # (B, T = 1)
        slots = torch.arange(self.used, device=device)
        self.mask = (slots <= self.positions)[:, None, None, :]  # (B, 1, T = 1, S)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        return keys[:, :, : self.used], values[:, :, : self.used]


def prefill(model: GPT, cache: KVCache, rows: list[Row]) -> None:
    """Encodes all but the newest token of each row; samples of one prompt share the work.

    The newest token is left to the first step of decoding. One prompt at a time: no padding, and
    the same arithmetic as for the prompt alone.
    """
    first_with: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows):
        source = first_with.setdefault(tuple(row.ids), index)
        if source == index:
            cache.fill(model, index, row.ids[:-1])
        else:
            cache.copy(source, index)


def choose(
    logits: Tensor, sampling: Sampling, draws: list[float], occurred: list[list[int]]
) -> list[int]:
    """The next token of each row: logits (B, V), a number in [0, 1) a row, tokens so far.

    The order of the filters is that of `transformers`: repetition, temperature, top-k, top-p,
    min-p. Raises UserError for logits that are no numbers: the weights are broken.

    Source: repetition penalty: Keskar et al. 2019 (CTRL), section 4.1 (deviation: negative logits
    are multiplied); top-k: Fan et al. 2018; top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, sampling.repetition_penalty, occurred)
    best, likeliest = logits.max(-1, keepdim=True)  # (B, 1)
    if sampling.temperature == 0:
        tokens = likeliest
    else:
        # The largest first becomes 0: a tiny temperature then overflows to -inf, never to NaN.
        logits = (logits - best) / max(sampling.temperature, 1e-8)
        cdf = keep_likely(logits, sampling).softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
        at = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None]
        tokens = torch.searchsorted(cdf, at.clamp(max=1 - 2**-40) * cdf[:, -1:], right=True)
    tokens = torch.where(best.isfinite(), tokens, -1)
    chosen: list[int] = tokens[:, 0].tolist()
    if min(chosen) < 0 or max(chosen) >= logits.size(-1):
        raise UserError("the model's logits are not finite: its weights are broken; take another")
    return chosen


def penalize(logits: Tensor, penalty: float, occurred: list[list[int]]) -> Tensor:
    """Makes tokens that occurred less likely (more, for a penalty below 1)."""
    logits = logits.clone()
    for row, ids in zip(logits, occurred, strict=True):
        seen = torch.tensor(list(set(ids)), device=logits.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logits (B, V) that top-k, top-p and min-p exclude to -inf; their largest is 0."""
    vocab_size = logits.size(-1)
    if sampling.top_k is not None and sampling.top_k < vocab_size:
        smallest = logits.topk(sampling.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        smallest = top_p_threshold(logits, sampling.top_p)  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.min_p:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits


def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit (B, 1) of the fewest tokens whose probabilities reach `top_p`."""
    total = logits.logsumexp(-1, keepdim=True)
    for candidates in (min(TOP_P_CANDIDATES, logits.size(-1)), logits.size(-1)):
        values = logits.topk(candidates).values  # (B, candidates), largest first
        mass = (values - total).exp().cumsum(-1)
        if bool((mass[:, -1] >= top_p).all()):
            break
    fewest = (mass < top_p).sum(-1, keepdim=True).clamp(max=values.size(-1) - 1)
    return values.gather(-1, fewest)


class SplitLinear(nn.Module):
    """A linear layer whose product with a single token uses all cores.

    A plain one-row product runs on one core. Here the weight's rows are cut into as many blocks as
    there are cores: views, so the weights exist once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, blocks: int) -> None:
        """Takes the layer's weight (out_features, in_features) and bias, and how many blocks."""
        super().__init__()
        self.weight, self.bias, self.blocks = weight, bias, blocks
        out_features, self.in_features = weight.shape
        even = out_features // blocks * blocks
        cut = weight.detach()[:even].view(blocks, -1, self.in_features)
        self.cut = cut.transpose(1, 2)  # (blocks, in_features, rows)
        self.cut_bias = None if bias is None else bias.detach()[:even].view(blocks, 1, -1)
        self.rest = weight.detach()[even:]
        self.rest_bias = None if bias is None else bias.detach()[even:]

    def forward(self, x: Tensor) -> Tensor:
        """As the linear layer: (B, T, in_features) to (B, T, out_features)."""
        if x.numel() != self.in_features:
            return F.linear(x, self.weight, self.bias)
        row = x.reshape(1, 1, -1).expand(self.blocks, 1, self.in_features)
        if self.cut_bias is None:
            out = torch.bmm(row, self.cut)  # (blocks, 1, rows)
        else:
            out = torch.baddbmm(self.cut_bias, row, self.cut)  # (blocks, 1, rows)
        out = out.view(1, 1, -1)  # (B = 1, T = 1, even)
        if len(self.rest):
            out = torch.cat((out, F.linear(x, self.rest, self.rest_bias)), dim=-1)
        return out


class FusedAttention(Attention):
    """Attention that makes a single token's q, k and v in one product, from a copy of the weights.

    Three products of a third of the size spend more of their time on getting started.
    """

    def __init__(self, attention: Attention, blocks: int) -> None:
        """Takes over the layers of `attention`."""
        nn.Module.__init__(self)
        vars(self).update(vars(attention))
        layers = (self.wq, self.wk, self.wv)
        self.heads = [layer.out_features // self.head_dim for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.fused = SplitLinear(weight, torch.cat(biases) if biases else None, blocks)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The q, k and v of each token, cut into heads: (B, T, H, D)."""
        if x.numel() != self.fused.in_features:
            return super().project(x)
        heads: Tensor = self.fused(x).view(1, 1, -1, self.head_dim)
        q, k, v = torch.split(heads, self.heads, dim=2)
        return q, k, v


def prepare_for_decode(model: GPT) -> GPT:
    """The model in evaluation mode, quick at one token at a time; shares the model's weights.

    Only what makes q, k and v is copied, so prepare again after the weights have changed.
    """
    shared = (*model.parameters(), *model.buffers())
    decoder = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared}).eval()
    weight, blocks = model.tok_emb.weight, torch.get_num_threads()
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and blocks > 1:
        for block in decoder.blocks.children():
            if isinstance(block, Block) and block.attn.wq.weight.numel() >= SPLIT_MIN_WEIGHTS:
                block.attn = FusedAttention(block.attn, blocks)
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child.weight.numel() >= SPLIT_MIN_WEIGHTS:
                    split = SplitLinear(child.weight, child.bias, min(blocks, child.out_features))
                    setattr(parent, name, split)
    return decoder
