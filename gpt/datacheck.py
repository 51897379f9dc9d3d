"""What the tokens tell before the first step: repeats, leaks, a tokenizer that misfits."""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from gpt.data import TokenData
from gpt.shards import Split

SAMPLE_TOKENS = 4_000_000
ENTROPY_TOKENS = 2_000_000
PASSAGE_BYTES = 120  # text of this length that comes twice is a copy, not a turn of phrase
MIN_PASSAGE_TOKENS = 16
KEEP_ONE_IN = 8  # passages kept for comparison, chosen by their content
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64


@dataclass(frozen=True)
class DataCheck:
    """What the tokens tell. Shares are of passages of about PASSAGE_BYTES.

    Attributes:
        unigram_entropy: nats per token: the loss of who knows the tokens' frequencies alone.
        duplicate_share: passages of the training text that stand in it more than once.
        leak_share: passages of the validation text that stand in the training text.
        bytes_per_token: of the training text.
        used_share: ids of the vocabulary that the training text uses.
        checked_tokens: how many were looked at.
    """

    unigram_entropy: float
    duplicate_share: float
    leak_share: float
    bytes_per_token: float
    used_share: float
    checked_tokens: int

    def record(self) -> dict[str, float]:
        """The numbers by name, rounded for a log."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def check_data(data: TokenData) -> DataCheck:
    """Looks at up to SAMPLE_TOKENS of each side; well under a second."""
    vocab_size = data.tokenizer.vocab_size
    counts = token_counts(data.train, vocab_size)
    bytes_per_token = data.train.n_bytes / max(1, data.train.n_tokens)
    length = max(MIN_PASSAGE_TOKENS, round(PASSAGE_BYTES / max(bytes_per_token, 1e-9)))
    train, val = passages(data.train, length), passages(data.val, length)
    seen, times = np.unique(train, return_counts=True)
    repeated = int(times[times > 1].sum())
    leaked = int(np.isin(val, seen).sum())
    return DataCheck(
        unigram_entropy=_entropy(counts),
        duplicate_share=repeated / max(1, train.size),
        leak_share=leaked / max(1, val.size),
        bytes_per_token=bytes_per_token,
        used_share=float((counts > 0).mean()),
        checked_tokens=min(SAMPLE_TOKENS, data.train.n_tokens),
    )


def unigram_entropy(split: Split, vocab_size: int) -> float:
    """Entropy of the tokens' frequencies in nats per token: the loss of who knows nothing else."""
    return _entropy(token_counts(split, vocab_size))


def token_counts(split: Split, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs in at most ENTROPY_TOKENS, in pieces evenly over the text."""
    pieces = min(64, split.n_tokens)
    length = min(split.n_tokens, ENTROPY_TOKENS) // pieces
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in np.linspace(0, split.n_tokens - length, pieces).astype(int):
        counts += np.bincount(split.read(int(start), length), minlength=vocab_size)
    return counts


def passages(split: Split, length: int) -> npt.NDArray[np.uint64]:
    """Fingerprints of one in KEEP_ONE_IN windows of `length` tokens.

    Which ones are kept depends on their content alone, so that a copy is found wherever it stands.
    Source: Schleimer, Wilkerson and Aiken 2003 ("Winnowing"), section 3; windows of one text are
    hashed by differences of one running sum (Karp and Rabin 1987), here modulo 2^64.
    """
    n_pieces = max(1, min(16, split.n_tokens // max(1, 4 * length)))
    size = min(split.n_tokens, SAMPLE_TOKENS) // n_pieces
    found = [np.empty(0, np.uint64)]
    for start in np.linspace(0, split.n_tokens - size, n_pieces).astype(int):
        if size >= length:
            found.append(_fingerprints(split.read(int(start), size), length))
    return np.concatenate(found)


def _fingerprints(ids: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.uint64]:
    inverse = np.uint64(pow(int(_BASE), -1, 2**64))
    powers = np.full(ids.size, _BASE, np.uint64)
    inverses = np.full(ids.size, inverse, np.uint64)
    powers[0] = inverses[0] = 1
    powers, inverses = np.cumprod(powers), np.cumprod(inverses)  # they wrap, as they should
    terms = (ids.astype(np.uint64) + np.uint64(1)) * powers
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    windows = (sums[length:] - sums[:-length]) * inverses[: ids.size - length + 1]
    mixed = (windows ^ (windows >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    kept: npt.NDArray[np.uint64] = mixed[mixed % np.uint64(KEEP_ONE_IN) == 0]
    return kept


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
