"""Documents to the two sides of the split, such that no text stands on both; streams everything."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt.config import DataConfig
from gpt.configfile import named
from gpt.errors import UserError
from gpt.sources import Document, cut_pieces, documents, source_files, source_name

__all__ = ["Corpus", "Partition", "Piece", "scan", "source_files"]

MAX_SORTED_DOCUMENTS = 1_000_000  # above it the split needs no list of documents
_PIECE = 2**20  # characters that become UTF-8 at once
_BLANK = 2  # in `Corpus.sides`, beside False and True


class Piece(NamedTuple):
    """Some text of one side; `ends` says that the document ends with it."""

    text: str
    val: bool
    ends: bool


@dataclass(frozen=True)
class Partition:
    """Which text is validation text, without a list of documents where there are too many.

    `how` is `documents` (those whose hash is in `val`), `hash` (those whose hash is below
    `threshold`) or `tail` (all characters from `cut` on).
    """

    how: str
    val: frozenset[int] = frozenset()
    threshold: int = 0
    cut: int = 0

    def is_val(self, document_hash: int) -> bool:
        """The side of a whole document; identical documents share it."""
        return (
            document_hash in self.val if self.how == "documents" else document_hash < self.threshold
        )


class _Measure(NamedTuple):
    n_chars: int
    n_bytes: int
    digest: bytes
    blank: bool

    @property
    def hash(self) -> int:
        return int.from_bytes(self.digest[:8], "big")


@dataclass(frozen=True)
class Corpus:
    """A scanned source. `fingerprint` depends on the documents and their order only.

    `sides` says of each document whether it is validation text, or blank, where a list is kept:
    it can then be read once, without knowing first what it holds.
    """

    config: DataConfig
    n_documents: int
    n_chars: int
    n_bytes: int
    fingerprint: str
    partition: Partition
    summary: str
    sides: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        """The source as people named it."""
        return source_name(self.config)

    def pieces(self) -> Iterator[Piece]:
        """All text in order with its side; `UserError` if it changed since the scan."""
        total = hashlib.sha256()
        for number, document in enumerate(documents(self.config)):
            side = self.sides[number] if number < len(self.sides) else _BLANK
            if side == _BLANK:  # or not on the list
                measure = _measure(document)
                if measure.blank:
                    continue
                side = self.partition.is_val(measure.hash)
            digest = hashlib.sha256()
            texts = cut_pieces(_hashed(document.chunks(), digest))
            if self.partition.how == "tail":
                yield from _tail_pieces(texts, self.partition.cut, self.n_documents > 1)
            else:
                for text in texts:
                    yield Piece(text, bool(side), ends=False)
                yield Piece("", bool(side), ends=True)
            total.update(digest.digest())
        if total.hexdigest() != self.fingerprint:
            raise UserError(
                f"data.source: the text of {source_name(self.config)} changed while it was read; "
                "start again when nothing writes to it"
            )

    def texts(self, *, train_only: bool) -> Iterator[str]:
        """The text alone, for those who only count."""
        return (piece.text for piece in self.pieces() if not (train_only and piece.val))


@named("data.source")
def scan(config: DataConfig, *, progress: bool = True) -> Corpus:
    """Reads the source once: sizes, fingerprint, and the split."""
    total, n_documents, n_chars, n_bytes, smallest = hashlib.sha256(), 0, 0, 0, 0
    hashes, sizes, blanks = array("Q"), array("Q"), bytearray()
    distinct: set[int] = set()  # of two documents at most, enough to tell one from several
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None if progress else True) as bar:
        for document in documents(config):
            measure = _measure(document)
            if n_documents < MAX_SORTED_DOCUMENTS:
                blanks.append(measure.blank)
            if measure.blank:
                continue
            total.update(measure.digest)
            n_documents, n_bytes = n_documents + 1, n_bytes + measure.n_bytes
            n_chars, smallest = n_chars + measure.n_chars, measure.n_chars
            if len(distinct) < 2:
                distinct.add(measure.hash)
            if n_documents <= MAX_SORTED_DOCUMENTS:
                hashes.append(measure.hash)
                sizes.append(measure.n_bytes)
            bar.update(measure.n_bytes)
    if not n_documents:
        raise UserError(
            f"data.source: {source_name(config)} holds no text; give a file with text in it"
        )
    fraction = config.val_fraction
    sides = bytes(_BLANK * blank for blank in blanks)
    if len(distinct) == 1:
        # As nanoGPT cuts it (data/shakespeare_char/prepare.py); copies of one text are cut alike.
        partition = Partition("tail", cut=int(smallest * (1 - fraction)))
        how = f"the last {fraction:.2%} of the characters"
    elif n_documents > MAX_SORTED_DOCUMENTS:
        partition, sides = Partition("hash", threshold=int(fraction * 2**64)), b""
        how = f"whole documents, {fraction:.2%} of them by hash"
    else:
        val = _choose(np.asarray(hashes), np.asarray(sizes), fraction * n_bytes)
        partition = Partition("documents", val=val)
        in_order = iter(hashes)
        sides = bytes(_BLANK if blank else next(in_order) in val for blank in blanks)
        how = f"whole documents, {len(val)} distinct of {len(set(hashes))}"
    return Corpus(
        config,
        n_documents,
        n_chars,
        n_bytes,
        total.hexdigest(),
        partition,
        f"validation: {how}",
        sides,
    )


def _choose(
    hashes: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.uint64],
    wanted_bytes: float,
) -> frozenset[int]:
    """Hashes of the validation documents: in order of hash, each that still fits, at least one."""
    distinct, place = np.unique(hashes, return_inverse=True)
    weight = np.bincount(place, weights=sizes)  # copies of a document move together
    chosen, taken = [], 0.0
    for document_hash, n_bytes in zip(distinct.tolist(), weight.tolist(), strict=True):
        if taken + n_bytes <= wanted_bytes:
            chosen.append(document_hash)
            taken += n_bytes
    return frozenset(chosen or [int(distinct[np.argmin(weight)])])


def _measure(document: Document) -> _Measure:
    n_chars, n_bytes, digest, blank = 0, 0, hashlib.sha256(), True
    for text in document.chunks():
        n_chars, n_bytes = n_chars + len(text), n_bytes + _digest(text, digest)
        blank = blank and (not text or text.isspace())
    return _Measure(n_chars, n_bytes, digest.digest(), blank)


def _hashed(chunks: Iterable[str], digest: "hashlib._Hash") -> Iterator[str]:
    """The chunks as they are; `digest` takes their UTF-8 on the way."""
    for text in chunks:
        _digest(text, digest)
        yield text


def _digest(text: str, digest: "hashlib._Hash") -> int:
    """Hashes a text as UTF-8, in pieces, whose memory is used again; the number of its bytes."""
    n_bytes = 0
    for start in range(0, len(text), _PIECE):
        content = text[start : start + _PIECE].encode()
        digest.update(content)
        n_bytes += len(content)
    return n_bytes


def _tail_pieces(texts: Iterable[str], cut: int, copies: bool) -> Iterator[Piece]:
    """The pieces before and after character `cut`; an end only separates copies of the document."""
    position = 0
    for text in texts:
        head = max(0, min(len(text), cut - position))
        if head:
            yield Piece(text[:head], val=False, ends=False)
        if head < len(text):
            yield Piece(text[head:], val=True, ends=False)
        position += len(text)
    if copies:
        yield from (Piece("", val, ends=True) for val in (False, True))
