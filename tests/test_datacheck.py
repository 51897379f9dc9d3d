"""What is found in tokens before the first step: copies, leaks, frequencies."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import open_data
from gpt.datacheck import check_data, passages, token_counts, unigram_entropy
from gpt.shards import Split
from tests.conftest import ConfigMaker

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Vocabulary:
    vocab_size: int


@dataclass(frozen=True)
class Tokens:
    """As much of a TokenData as a check asks for."""

    train: Split
    val: Split
    tokenizer: Vocabulary


def split_of(ids: Ids, bytes_per_token: float = 4.0) -> Split:
    """In three files, so that passages cross their borders."""
    arrays = np.array_split(ids, 3)
    ends = np.cumsum([array.size for array in arrays])
    return Split(len(ids), round(bytes_per_token * len(ids)), 1, arrays, ends)


def tokens(train: Ids, val: Ids, vocab_size: int = 4096) -> Any:
    return Tokens(split_of(train), split_of(val), Vocabulary(vocab_size))


def random_ids(count: int, seed: int, vocab_size: int = 4096) -> Ids:
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.uint16)


def test_random_text_has_neither_copies_nor_leaks() -> None:
    found = check_data(tokens(random_ids(300_000, 1), random_ids(30_000, 2)))
    assert (found.duplicate_share, found.leak_share) == (0, 0)
    assert found.unigram_entropy == pytest.approx(math.log(4096), rel=0.01)
    assert found.bytes_per_token == 4
    assert found.used_share == 1
    assert found.checked_tokens == 300_000


@pytest.mark.parametrize("shift", [0, 1, 7, 4001])
def test_copies_are_found_wherever_they_stand(shift: int) -> None:
    """100k tokens of which 30k come again, behind a number of others that fits no grid."""
    once, filler = random_ids(100_000, 3), random_ids(20_000 + shift, 4)
    text = np.concatenate([once, filler, once[10_000:40_000]])
    found = check_data(tokens(text, random_ids(10_000, 5)))
    assert found.duplicate_share == pytest.approx(60_000 / len(text), abs=0.02)
    assert found.leak_share == 0


def test_a_text_that_is_all_copies() -> None:
    found = check_data(tokens(np.tile(random_ids(10_000, 6), 20), random_ids(10_000, 7)))
    assert found.duplicate_share > 0.98


def test_a_copied_tail_is_a_leak() -> None:
    train = random_ids(200_000, 8)
    val = np.concatenate([random_ids(15_000, 9), train[50_013:55_013]])
    found = check_data(tokens(train, val))
    assert found.leak_share == pytest.approx(5_000 / 20_000, abs=0.02)
    assert found.duplicate_share == 0
    assert check_data(tokens(train, train[-20_000:])).leak_share > 0.98


def test_a_phrase_that_is_shorter_than_a_passage_is_no_copy() -> None:
    """Every second 20 tokens are the same ones; a passage of 120 bytes has 30 here."""
    fresh = random_ids(200_000, 10).reshape(-1, 20)
    fresh[::2] = fresh[0]
    found = check_data(tokens(fresh.reshape(-1), random_ids(1000, 11)))
    assert found.duplicate_share == 0


@given(
    n_train=st.integers(1, 70),
    n_val=st.integers(0, 40),
    vocab_size=st.integers(1, 300),
    bytes_per_token=st.floats(0, 12),
)
def test_short_texts(n_train: int, n_val: int, vocab_size: int, bytes_per_token: float) -> None:
    """Shorter than a passage, of one token, without validation, or of no bytes at all."""
    train, val = random_ids(n_train, 12, vocab_size), random_ids(n_val, 13, vocab_size)
    data: Any = Tokens(
        split_of(train, bytes_per_token), split_of(val, bytes_per_token), Vocabulary(vocab_size)
    )
    found = check_data(data)
    assert 0 <= found.duplicate_share <= 1
    assert 0 <= found.leak_share <= 1
    assert 0 <= found.unigram_entropy <= math.log(vocab_size) + 1e-9
    assert 0 < found.used_share <= 1
    assert all(math.isfinite(value) for value in found.record().values())


def test_one_token_again_and_again() -> None:
    found = check_data(tokens(np.zeros(50_000, np.uint16), np.zeros(5_000, np.uint16)))
    assert found.unigram_entropy == 0
    assert found.used_share == pytest.approx(1 / 4096)
    # All windows are the same one, which is kept or not: either answer is a share.
    assert found.duplicate_share in (0, 1)
    assert found.leak_share == found.duplicate_share


def test_windows_of_the_same_tokens_have_the_same_fingerprint() -> None:
    """By brute force: fingerprints are equal exactly where the tokens are."""
    ids = random_ids(4_000, 14, vocab_size=2)
    prints = passages(Split(len(ids), 1, 1, [ids], np.array([len(ids)])), 16)
    windows = {ids[start : start + 16].tobytes() for start in range(len(ids) - 15)}
    shifted = passages(Split(3_993, 1, 1, [ids[7:]], np.array([3_993])), 16)
    assert 0.06 < len(np.unique(prints)) / len(windows) < 0.2  # one in eight is kept
    assert np.isin(shifted, prints).mean() > 0.9  # the pieces' borders lie elsewhere


def test_unigram_entropy_of_known_frequencies() -> None:
    ids = np.tile(np.array([0, 0, 0, 1], dtype=np.uint16), 5000)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy(split_of(ids), 4) == pytest.approx(expected, rel=1e-3)
    few = Split(3, 1, 1, [ids[1:4]], np.array([3]))
    assert unigram_entropy(few, 4) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_counts_come_from_all_over_the_text() -> None:
    """Half of the text is 0s and half 1s; a sample of its start would know only one of them."""
    ids = np.repeat(np.array([0, 1], np.uint16), 3_000_000)
    counts = token_counts(split_of(ids), 2)
    assert counts.sum() == 64 * (2_000_000 // 64)
    assert counts[0] / counts.sum() == pytest.approx(0.5, abs=0.01)


def test_a_large_text_takes_a_moment() -> None:
    data = tokens(random_ids(5_000_000, 15), random_ids(1_000_000, 16))
    start = time.process_time()
    found = check_data(data)
    assert time.process_time() - start < 2
    assert found.checked_tokens == 4_000_000


def test_the_text_of_the_tests_is_checked(make_config: ConfigMaker) -> None:
    """Its words are random: nothing of it comes again, and bytes cover a part of their ids."""
    found = check_data(open_data(make_config(), progress=False))
    assert found.duplicate_share == found.leak_share == 0
    assert found.bytes_per_token == 1
    assert 0.05 < found.used_share < 0.2
