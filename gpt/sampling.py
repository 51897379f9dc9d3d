"""Which token comes next: the settings, and the choice among a model's logits. Knows no text."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt.errors import UserError

# Candidates looked at first by top-p; the whole vocabulary is sorted only if they hold too little.
TOP_P_CANDIDATES = 1024
BROKEN = "the model's logits are not finite: its weights are broken; take another"


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

    @property
    def is_plain(self) -> bool:
        """Whether a token's probability alone counts: no filter, or the likeliest is taken."""
        limits = (self.top_k, self.top_p, self.min_p or None)
        return self.repetition_penalty == 1 and (self.temperature == 0 or not any(limits))


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
    if logits.device.type not in ("cpu", "cuda"):  # Apple's mps has no float64
        logits = logits.cpu()
    if len(draws) == 1 and logits.device.type == "cpu" and sampling.is_plain:
        return [_draw_plain(logits[0].numpy(), sampling.temperature, draws[0])]
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
        raise UserError(BROKEN)
    return chosen


def _draw_plain(logits: npt.NDArray[np.float32], temperature: float, draw: float) -> int:
    """What `choose` does for one row without filters, in NumPy, which starts sooner than torch."""
    likeliest = int(logits.argmax())  # a number that is none counts as the largest
    best = float(logits[likeliest])
    if not math.isfinite(best):
        raise UserError(BROKEN)
    if temperature == 0:
        return likeliest
    scaled = (logits - best).astype(np.float64) / max(temperature, 1e-8)  # (V,)
    cdf = np.exp(scaled).cumsum()
    return int(cdf.searchsorted(min(draw, 1 - 2**-40) * cdf[-1], side="right"))


def penalize(logits: Tensor, penalty: float, occurred: list[list[int]]) -> Tensor:
    """Makes tokens that occurred less likely (more, for a penalty below 1)."""
    logits = logits.clone()
    largest = torch.finfo(logits.dtype).max
    for row, ids in zip(logits, occurred, strict=True):
        seen = torch.tensor(list(set(ids)), device=logits.device)
        likely = row[seen].double()  # any penalty is finite in it; infinity would be a broken model
        changed = torch.where(likely > 0, likely / penalty, likely * penalty)
        row[seen] = changed.clamp(-largest, largest).to(logits.dtype)
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
