"""Shards hold every id, across files, and damage is found before it is used."""

from pathlib import Path

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.shards import HEADER_BYTES, ShardWriter, Split, SplitMeta, dtype_for, open_split

FINGERPRINTS = ("ab" * 32, "cd" * 32)


def write(folder: Path, ids: np.ndarray, vocab_size: int, shard_tokens: int = 100) -> SplitMeta:
    writer = ShardWriter(folder, "train", vocab_size, FINGERPRINTS, shard_tokens)
    for part in np.array_split(ids.astype(np.uint32), 7):
        writer.write(part)
    return writer.close()


def open_again(folder: Path, meta: SplitMeta, vocab_size: int) -> Split:
    return open_split(folder, meta, vocab_size, FINGERPRINTS)


@pytest.mark.parametrize("vocab_size", [257, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("count", [0, 1, 100, 101, 1234])
def test_reading_gives_what_was_written(vocab_size: int, count: int, tmp_path: Path):
    ids = np.random.default_rng(0).integers(0, vocab_size, count)
    ids[-1:] = vocab_size - 1
    meta = write(tmp_path, ids, vocab_size)
    split = open_again(tmp_path, meta, vocab_size)
    assert split.n_tokens == count
    assert len(meta.shards) == -(-count // 100)
    for start in range(0, count, 37):
        for length in (0, 1, 37, 250):
            if start + length <= count:
                assert np.array_equal(split.read(start, length), ids[start : start + length])
    assert np.array_equal(split.read(0, count), ids)
    width = 2 if vocab_size <= 65_536 else 4
    assert sum(s.size for s in meta.shards) == count * width + len(meta.shards) * HEADER_BYTES


def test_ids_are_never_wrapped(tmp_path: Path):
    assert dtype_for(65_536).itemsize == 2
    assert dtype_for(65_537).itemsize == 4
    writer = ShardWriter(tmp_path, "train", 300, FINGERPRINTS)
    with pytest.raises(UserError, match="300"):
        writer.write(np.array([65_536 + 5], dtype=np.uint32))


def test_damage_is_found(tmp_path: Path):
    meta = write(tmp_path, np.arange(250), 300)
    path = tmp_path / meta.shards[1].name
    content = path.read_bytes()
    for place in (0, 8, 12, 16, 40, 100, HEADER_BYTES, len(content) - 1):
        bad = bytearray(content)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            open_again(tmp_path, meta, 300)
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match="bytes instead of"):
        open_again(tmp_path, meta, 300)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_again(tmp_path, meta, 300)
    path.write_bytes(content)
    assert open_again(tmp_path, meta, 300).n_tokens == 250


def test_shards_of_another_text_or_tokenizer_are_refused(tmp_path: Path):
    meta = write(tmp_path, np.arange(250), 300)
    with pytest.raises(UserError, match="header"):
        open_split(tmp_path, meta, 300, (FINGERPRINTS[0], "ef" * 32))
    with pytest.raises(UserError, match="header"):
        open_split(tmp_path, meta, 100_000, FINGERPRINTS)
    wrong = meta.model_copy(update={"n_tokens": 251})
    with pytest.raises(UserError, match="251"):
        open_split(tmp_path, wrong, 300, FINGERPRINTS)
