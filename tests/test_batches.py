"""A batch depends on seed and sample index alone, and an epoch is every window once."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.batches import Batches, eval_batches, permute
from gpt.errors import UserError
from gpt.shards import Split


def split_of(n_tokens: int, n_shards: int = 3) -> Split:
    """Tokens 0, 1, 2, ... so that a window shows where it stands."""
    arrays = np.array_split(np.arange(n_tokens, dtype=np.uint32), n_shards)
    return Split(n_tokens, n_tokens, 1, arrays, np.cumsum([array.size for array in arrays]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n: int, key: int):
    result = permute(np.arange(n, dtype=np.uint64), n, key)
    assert sorted(result.tolist()) == list(range(n))


def test_permutation_is_one_index_at_a_time_and_large():
    n = 10**12 + 39
    index = np.arange(0, n, n // 999, dtype=np.uint64)
    together = permute(index, n, 7)
    assert together.max() < n
    assert len(set(together.tolist())) == len(index)
    assert [int(permute(index[i : i + 1], n, 7)[0]) for i in range(20)] == together[:20].tolist()


def test_permutations_look_random():
    n, counts = 50, np.zeros((50, 50))
    for key in range(1000):
        counts[
            np.arange(n), permute(np.arange(n, dtype=np.uint64), n, key * 2**40).astype(int)
        ] += 1
    expected = 1000 / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 49 * 49) < 6 * np.sqrt(2 * 49 * 49)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n_tokens=st.integers(2, 400),
    context_len=st.integers(1, 40),
    batch_size=st.integers(1, 13),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_is_every_window_once(n_tokens: int, context_len: int, batch_size: int, seed: int):
    context_len = min(context_len, n_tokens - 1)
    batches = Batches(split_of(n_tokens), context_len, batch_size, seed)
    n = batches.n_windows
    assert n == (n_tokens - 1) // context_len
    n_steps = -(-3 * n // batch_size)
    pairs = [batches.batch(step) for step in range(n_steps)]
    inputs = torch.cat([x for x, _ in pairs])[: 3 * n]
    targets = torch.cat([y for _, y in pairs])[: 3 * n]
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    for epoch in range(3):
        seen = inputs[epoch * n : (epoch + 1) * n].flatten()
        assert len(seen.unique()) == n * context_len  # no token twice
        offset = int(seen.min())
        assert 0 <= offset <= (n_tokens - 1) % context_len
        assert int(seen.max()) == offset + n * context_len - 1


def test_epochs_and_seeds_differ_in_order_and_offset():
    batches = Batches(split_of(64 * 16), 16, 63, 5)
    first, second = batches.batch(0)[0], batches.batch(1)[0]
    assert batches.epoch(1) == 1.0
    assert batches.epoch(0) == 0.0
    offsets = {int(batches.batch(step)[0].min()) for step in range(60)}
    assert len(offsets) > 10
    order = (first[:, 0] // 16).tolist()
    assert order != (second[:, 0] // 16).tolist()
    assert order != (Batches(split_of(64 * 16), 16, 63, 6).batch(0)[0][:, 0] // 16).tolist()
    assert torch.equal(first, Batches(split_of(64 * 16, 5), 16, 63, 5).batch(0)[0])


def test_without_shuffling_the_text_comes_in_its_order():
    """Whole epochs of it, each from its own offset, as with shuffling."""
    batches = Batches(split_of(1000), 9, 16, 1, shuffle=False)
    n = batches.n_windows
    pairs = [batches.batch(step) for step in range(3 * n // 16 + 1)]
    inputs, targets = (torch.cat(parts)[: 3 * n] for parts in zip(*pairs, strict=True))
    assert torch.equal(targets, inputs + 1)
    for epoch in range(3):
        tokens = inputs[epoch * n : (epoch + 1) * n].flatten()
        assert torch.equal(tokens, torch.arange(len(tokens)) + tokens[0])
        shuffled = Batches(split_of(1000), 9, n, 1).batch(epoch)[0]
        assert int(shuffled.min()) == int(tokens[0])


def test_rows_are_parts_of_the_same_batch():
    batches = Batches(split_of(1000), 9, 16, 1)
    whole = batches.batch(13)
    for rows in (slice(0, 4), slice(4, 16), slice(3, 16, 5), slice(None)):
        for part, all_rows in zip(batches.batch(13, rows), whole, strict=True):
            assert torch.equal(part, all_rows[rows])
    samples = torch.cat([batches.batch(step)[0] for step in range(4)])
    other = Batches(split_of(1000), 9, 32, 1)  # the sample index decides, not the batch size
    assert torch.equal(samples, torch.cat([other.batch(step)[0] for step in range(2)]))


def test_batches_are_those_of_the_first_version():
    inputs, _ = Batches(split_of(1000), 10, 6, 1337).batch(1000)
    assert inputs[:, 0].tolist() == [982, 652, 602, 402, 522, 922]  # resumed runs rely on it


def test_a_late_step_of_a_huge_split_costs_nothing():
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (10**12,), (0,))
    split = Split(10**12, 10**12, 1, [huge], np.array([10**12]))
    start = time.perf_counter()
    inputs, _ = Batches(split, 1024, 64, 0).batch(10**9)
    assert inputs.shape == (64, 1024)
    assert time.perf_counter() - start < 1


def test_a_text_shorter_than_the_context_names_value_limit_and_fix():
    Batches(split_of(257), 256, 1, 0)
    with pytest.raises(UserError, match=r"256.*256 tokens.*at least 257.*255 or less"):
        Batches(split_of(256), 256, 1, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n_tokens=st.integers(2, 300), context_len=st.integers(1, 50), batch_size=st.integers(1, 9))
def test_evaluation_predicts_every_token_but_the_first_once(
    n_tokens: int, context_len: int, batch_size: int
):
    split = split_of(n_tokens)
    pairs = list(eval_batches(split, context_len, batch_size, None))
    targets = torch.cat([y.flatten() for _, y in pairs])
    assert targets.tolist() == list(range(1, n_tokens))
    assert all(torch.equal(x + 1, y) for x, y in pairs)
    assert all(len(x) <= batch_size for x, _ in pairs)
    enough = list(eval_batches(split, context_len, batch_size, n_tokens - 1))
    assert [x.tolist() for x, _ in enough] == [x.tolist() for x, _ in pairs]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_tokens=st.integers(2, 300),
    context_len=st.integers(1, 50),
    max_tokens=st.integers(1, 300),
)
def test_bounded_evaluation_is_within_its_bound_spread_and_repeatable(
    n_tokens: int, context_len: int, max_tokens: int
):
    split = split_of(n_tokens)
    pairs = list(eval_batches(split, context_len, 4, max_tokens))
    targets = torch.cat([y.flatten() for _, y in pairs]).tolist()
    assert 0 < len(targets) == len(set(targets)) <= max(max_tokens, min(context_len, n_tokens - 1))
    again = list(eval_batches(split, context_len, 4, max_tokens))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs, again, strict=True))


def test_bounded_evaluation_reaches_both_ends():
    starts = [int(x[0, 0]) for x, _ in eval_batches(split_of(10_001), 10, 1, 200)]
    assert len(starts) == 20
    assert starts[0] < 500
    assert starts[-1] > 9500
    assert len(set(np.diff(starts))) == 1
