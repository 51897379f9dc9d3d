"""Shards: files of token ids behind a fixed header, memory-mapped; knows nothing of text."""

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from gpt.errors import UserError
from gpt.files import is_hollow, open_plain

MAGIC, VERSION = b"GPTSHARD", 1
HEADER_BYTES = 128
_HEADER = struct.Struct("<8sIIQ32s32s")  # magic, version, bytes an id, count, tokenizer, source
SHARD_TOKENS = 100_000_000
HASH_BYTES = 1 << 22

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class ShardMeta(BaseModel):
    """What a folder's meta.json says of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: str = Field(pattern=r"^(train|val)-\d{5}\.bin$")
    n_tokens: Count
    size: Count
    sha256: Hex


class SplitMeta(BaseModel):
    """What a folder's meta.json says of one side."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    n_tokens: Count
    n_bytes: Count
    n_documents: Count
    shards: list[ShardMeta]


@dataclass(frozen=True)
class Split:
    """The tokens of one side: `n_bytes` of UTF-8 text in `n_documents`, end tokens not counted."""

    n_tokens: int
    n_bytes: int
    n_documents: int
    arrays: Sequence[npt.NDArray[Any]] = field(repr=False)
    ends: npt.NDArray[np.int64] = field(repr=False)

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """`length` ids from position `start` on, uint16 or uint32, also across shard borders."""
        assert 0 <= start <= start + length <= self.n_tokens, (start, length, self.n_tokens)
        shard = int(np.searchsorted(self.ends, start, side="right"))
        parts, end = [], start + length
        while start < end:
            first = 0 if shard == 0 else int(self.ends[shard - 1])
            stop = min(end, int(self.ends[shard]))
            parts.append(self.arrays[shard][start - first : stop - first])
            start, shard = stop, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """`length` ids from each of the positions on, (positions, length)."""
        if len(self.arrays) > 1:
            return np.stack([self.read(int(start), length) for start in starts])
        assert starts.min() >= 0
        assert starts.max() + length <= self.n_tokens
        ids: npt.NDArray[Any] = self.arrays[0][starts[:, None] + np.arange(length)]
        return ids


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest type on disk that holds every id: 2 bytes up to 65,536 ids, else 4."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes the ids of one side, in files of at most `shard_tokens`."""

    def __init__(
        self,
        folder: Path,
        side: Literal["train", "val"],
        vocab_size: int,
        fingerprints: tuple[str, str],
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        """Takes the fingerprints of the tokenizer and of the source, for the headers."""
        self._folder, self._side, self._vocab_size = folder, side, vocab_size
        self._fingerprints, self._limit = fingerprints, shard_tokens
        self._dtype = dtype_for(vocab_size)
        self._counts: list[int] = []
        self._file: Any = None
        self.n_bytes = self.n_documents = 0

    def write(self, ids: npt.NDArray[np.uint32]) -> None:
        """Appends ids; one that is not in the vocabulary is refused, never wrapped."""
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise UserError(
                f"token id {ids.max()} is not below the vocabulary's {self._vocab_size}, and "
                "would not fit the shards; build the tokenizer again"
            )
        ids = ids.astype(self._dtype)
        while ids.size:
            if self._file is None or self._counts[-1] == self._limit:
                self._next_file()
            part = ids[: self._limit - self._counts[-1]]
            self._file.write(part.tobytes())
            self._counts[-1] += part.size
            ids = ids[part.size :]

    def close(self) -> SplitMeta:
        """Writes the last header, syncs, and describes what was written."""
        self._finish_file()
        shards = []
        for number, count in enumerate(self._counts):
            path = self._path(number)
            size, digest = path.stat().st_size, hash_file(path)
            shards.append(ShardMeta(name=path.name, n_tokens=count, size=size, sha256=digest))
        return SplitMeta(
            n_tokens=sum(self._counts),
            n_bytes=self.n_bytes,
            n_documents=self.n_documents,
            shards=shards,
        )

    def abandon(self) -> None:
        """Closes the file that is open, without caring for it."""
        if self._file is not None:
            self._file.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._side}-{number:05d}.bin"

    def _next_file(self) -> None:
        self._finish_file()
        self._file = self._path(len(self._counts)).open("wb")
        self._file.write(b"\0" * HEADER_BYTES)
        self._counts.append(0)

    def _finish_file(self) -> None:
        if self._file is None:
            return
        tokenizer, source = map(bytes.fromhex, self._fingerprints)
        header = _HEADER.pack(
            MAGIC, VERSION, self._dtype.itemsize, self._counts[-1], tokenizer, source
        )
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


def open_split(
    folder: Path, meta: SplitMeta, vocab_size: int, fingerprints: tuple[str, str]
) -> Split:
    """Maps the shards of one side, after checking size, SHA-256, header and ids of each."""
    if len({shard.name for shard in meta.shards}) < len(meta.shards):
        raise UserError(f"{folder}: damaged: meta.json names a shard twice")
    arrays = [_open_shard(folder, shard, vocab_size, fingerprints) for shard in meta.shards]
    ends = np.cumsum([array.size for array in arrays], dtype=np.int64)
    if sum(array.size for array in arrays) != meta.n_tokens:
        raise UserError(f"{folder}: the shards do not hold the {meta.n_tokens} tokens of meta.json")
    return Split(meta.n_tokens, meta.n_bytes, meta.n_documents, arrays, ends)


def _open_shard(
    folder: Path, meta: ShardMeta, vocab_size: int, fingerprints: tuple[str, str]
) -> npt.NDArray[Any]:
    path = folder / meta.name
    try:
        size = path.stat().st_size
        if path.is_symlink() or is_hollow(path):
            raise UserError(f"{path}: damaged: a link, or mostly holes; build the data again")
        if size != meta.size:
            raise UserError(f"{path}: damaged: {size} bytes instead of {meta.size}")
        dtype = dtype_for(vocab_size)
        header, sha256, largest = _read_through(path, dtype)
        if sha256 != meta.sha256:
            raise UserError(f"{path}: damaged: its SHA-256 is not that of meta.json")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    expected = _HEADER.pack(
        MAGIC, VERSION, dtype.itemsize, meta.n_tokens, *map(bytes.fromhex, fingerprints)
    )
    if header[: _HEADER.size] != expected or size != HEADER_BYTES + meta.n_tokens * dtype.itemsize:
        raise UserError(f"{path}: its header is not that of meta.json's tokenizer, text and count")
    try:
        ids = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(meta.n_tokens,))
    except (OSError, ValueError) as error:  # an empty one cannot be mapped
        raise UserError(f"{path}: cannot be mapped: {error}; build the data again") from None
    if largest >= vocab_size:
        raise UserError(
            f"{path}: holds ids that are not below the vocabulary's {vocab_size}; "
            "build the data again"
        )
    plain: npt.NDArray[Any] = ids.view(np.ndarray)  # a part of a memmap costs more than its ids
    return plain


def _read_through(path: Path, dtype: np.dtype[Any]) -> tuple[bytes, str, int]:
    """A shard's header, its SHA-256 and its largest id; not by its map, which would stay in memory.

    -1 where it holds no ids.
    """
    digest, largest = hashlib.sha256(), -1
    with open_plain(path) as file:
        header = file.read(HEADER_BYTES)
        digest.update(header)
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype=dtype, count=len(chunk) // dtype.itemsize)
            largest = max(largest, int(ids.max(initial=0)))
    return header, digest.hexdigest(), largest


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
