"""Documents to the two sides of the split, such that no text stands on both; streams everything."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
_BLANK, _CUT = 2, 3  # in `Corpus.sides`, beside False and True


class Piece(NamedTuple):
    """Some text of one side; `ends` says that the document ends with it."""

    text: str
    val: bool
    ends: bool


@dataclass(frozen=True)
class Partition:
    """Which text is validation text, without a list of documents where there are too many.

    `how` is `documents` (those whose hash is in `val`, and the tails of those in `long`), `hash`
    (those whose hash is below `threshold`) or `tail` (all characters from `cut` on).
    """

    how: str
    val: frozenset[int] = frozenset()
    long: frozenset[int] = frozenset()
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

    `sides` says of each document whether it is validation text, blank, or cut in two, where a list
    is kept: it can then be read once, without knowing first what it holds. `cuts` are the
    characters from which on those that are cut are validation text, in order.
    """

    config: DataConfig
    n_documents: int
    n_chars: int
    n_bytes: int
    fingerprint: str
    partition: Partition
    summary: str
    sides: bytes = field(default=b"", repr=False)
    cuts: "array[int]" = field(default_factory=lambda: array("Q"), repr=False)
    files: Sequence[Path] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The source as people named it."""
        return source_name(self.config)

    def pieces(self) -> Iterator[Piece]:
        """All text in order with its side; `UserError` if it changed since the scan."""
        total, cuts = hashlib.sha256(), iter(self.cuts)
        for number, document in enumerate(documents(self.config, self.files)):
            side = self.sides[number] if number < len(self.sides) else _BLANK
            if side == _BLANK:  # or not on the list
                measure = _measure(document)
                if measure.blank:
                    continue
                side = self.partition.is_val(measure.hash)
            digest = hashlib.sha256()
            texts = cut_pieces(_hashed(document.chunks(), digest))
            if self.partition.how == "tail":
                yield from _tail_pieces(texts, self.partition.cut, ends=self.n_documents > 1)
            elif side == _CUT:
                yield from _tail_pieces(texts, next(cuts), ends=True)
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
    files = source_files(config)
    total, n_documents, n_chars, n_bytes = hashlib.sha256(), 0, 0, 0
    hashes, sizes, lengths, blanks = array("Q"), array("Q"), array("Q"), bytearray()
    distinct: set[int] = set()  # of two documents at most, enough to tell one from several
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None if progress else True) as bar:
        for document in documents(config, files):
            measure = _measure(document)
            if n_documents < MAX_SORTED_DOCUMENTS:
                blanks.append(measure.blank)
            if measure.blank:
                continue
            total.update(measure.digest)
            n_documents += 1
            n_chars, n_bytes = n_chars + measure.n_chars, n_bytes + measure.n_bytes
            if len(distinct) < 2:
                distinct.add(measure.hash)
            if n_documents <= MAX_SORTED_DOCUMENTS:
                hashes.append(measure.hash)
                sizes.append(measure.n_bytes)
                lengths.append(measure.n_chars)
            bar.update(measure.n_bytes)
    if not n_documents:
        raise UserError(
            f"data.source: {source_name(config)} holds no text; give a file with text in it"
        )
    fraction = config.val_fraction
    sides, cuts = bytes(_BLANK * blank for blank in blanks), array("Q")
    if len(distinct) == 1:
        # As nanoGPT cuts it (data/shakespeare_char/prepare.py); copies of one text are cut alike.
        partition = Partition("tail", cut=_cut(lengths[0], fraction))
        how = f"the last {fraction:.2%} of the characters"
    elif n_documents > MAX_SORTED_DOCUMENTS:
        partition, sides = Partition("hash", threshold=int(fraction * 2**64)), b""
        how = f"whole documents, {fraction:.2%} of them by hash"
    else:
        val, long = _choose(np.asarray(hashes), np.asarray(sizes), fraction)
        partition = Partition("documents", val=val, long=long)
        in_order = (_CUT if each in long else each in val for each in hashes)
        sides = bytes(_BLANK if blank else next(in_order) for blank in blanks)
        texts = zip(hashes, lengths, strict=True)
        cuts.extend(_cut(length, fraction) for each, length in texts if each in long)
        how = f"whole documents, {len(val)} distinct of {len(set(hashes)) - len(long)}"
        how = _with_tails(how if val else "", len(long), fraction)
    return Corpus(
        config,
        n_documents,
        n_chars,
        n_bytes,
        total.hexdigest(),
        partition,
        f"validation: {how}",
        sides,
        cuts,
        files,
    )


def _choose(
    hashes: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64], fraction: float
) -> tuple[frozenset[int], frozenset[int]]:
    """Hashes of the validation documents, and of the long ones, of which the tail becomes that.

    A document is long if it is more than all of validation should be. Of the others, in order of
    hash, each that still fits into their share is taken whole. Next to a long one, a document that
    is more than its share of itself and all smaller ones is training text, and does not count: as
    it never fits, all of the smaller ones would be taken instead of it.
    """
    distinct, place = np.unique(hashes, return_inverse=True)
    weight = np.bincount(place, weights=sizes)  # copies of a document move together
    long = weight > fraction * weight.sum()
    ordered = np.sort(weight)
    fits = ordered <= fraction * np.cumsum(ordered)
    largest = ordered[fits][-1] if fits.any() else 0
    wanted_bytes = fraction * weight[weight <= largest].sum()
    chosen, taken = [], 0.0
    for document_hash, n_bytes in zip(distinct.tolist(), weight.tolist(), strict=True):
        if n_bytes <= largest and taken + n_bytes <= wanted_bytes:
            chosen.append(document_hash)
            taken += n_bytes
    return frozenset(chosen), frozenset(distinct[long].tolist())


def _cut(n_chars: int, fraction: float) -> int:
    """The character from which on a document is validation text, if it is cut."""
    return int(n_chars * (1 - fraction))


def _with_tails(whole: str, n_long: int, fraction: float) -> str:
    """The validation text in words, given those of its whole documents, or none."""
    documents = "documents" if n_long > 1 else "document"
    tails = f"the last {fraction:.2%} of the characters of {n_long} long {documents}"
    return ", and ".join(filter(None, [whole, tails if n_long else ""]))


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


def _tail_pieces(texts: Iterable[str], cut: int, *, ends: bool) -> Iterator[Piece]:
    """The pieces before and after character `cut`; with `ends`, both parts end there."""
    position = 0
    for text in texts:
        head = max(0, min(len(text), cut - position))
        if head:
            yield Piece(text[:head], val=False, ends=False)
        if head < len(text):
            yield Piece(text[head:], val=True, ends=False)
        position += len(text)
    if ends:
        yield from (Piece("", val, ends=True) for val in (False, True))
