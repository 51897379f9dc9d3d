"""Text to shards, once: built in parallel, verified, cached, built again when anything changed.

`Batches` and `eval_batches`, which read them, are in `batches`.
"""

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from gpt.batches import Batches, check_context, eval_batches
from gpt.config import Config, is_tokenizer_kind
from gpt.configfile import named
from gpt.corpus import Corpus, Piece, scan, source_files
from gpt.errors import UserError, say
from gpt.files import check_writable, is_sealed, locked, sealed, sync, write_durably
from gpt.malloc import freed_memory_given_back
from gpt.ranks import ranks_path
from gpt.shards import Hex, ShardWriter, Split, SplitMeta, open_split
from gpt.sources import STDLIB, file_stat
from gpt.tokenizer import Ids, Tokenizer, build_tokenizer, load_tokenizer, read_bounded

__all__ = [
    "Batches",
    "Split",
    "TokenData",
    "cached_data",
    "eval_batches",
    "kept_data",
    "kept_validation",
    "make_tokenizer",
    "open_data",
    "open_folder",
]

META_FILE = "meta.json"
FORMAT = 1
TASK_CHARS = 1 << 18  # text that one thread tokenizes at a time
MAX_THREADS = 16
MUCH_BYTES = 50_000_000  # of text, from which on memory counts


class Meta(BaseModel):
    """What a data folder holds, what it was made for, and how to see that it is stale."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: int
    request: Hex
    stamp: Hex
    fingerprint: Hex
    source: str
    source_fingerprint: Hex
    tokenizer_fingerprint: Hex
    split: str
    train: SplitMeta
    val: SplitMeta
    seal: Hex | None = None  # of the file; none in those of older versions


@dataclass(frozen=True)
class TokenData:
    """Tokenized text. `fingerprint` names text, tokenizer and split, wherever they lie."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    folder: Path
    fingerprint: str
    source: str
    split: str
    parts: dict[str, str]  # what the fingerprint is of, apart from the split


def open_data(config: Config, *, progress: bool = True) -> TokenData:
    """The shards that the config asks for; builds them if missing, stale or damaged, and says so.

    Several processes may call it at once: one builds, the others wait and use what it built.
    """
    files = source_files(config.data)  # first: a missing file must leave nothing behind
    folder = _folder(config)
    data = _cached(config, folder, files)  # needs no lock, and no right to write
    if data is not None:
        say(f"data: reused {_summary(data)}")
        return data
    check_writable("data.dir", folder.parent)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".lock-{folder.name}", wait=True):
            data = _reuse(config, folder, files)
            if data is None:
                with _memory(files):
                    data = _build(config, folder, files, progress=progress)
                say(f"data: built {_summary(data)}")
            else:
                say(f"data: reused {_summary(data)}")
    except OSError as error:
        raise UserError(
            f"data.dir: {folder}: cannot be written: {error.strerror}; "
            "make room there, or set another data.dir"
        ) from None
    return data


def cached_data(config: Config) -> TokenData | None:
    """The shards if they are there, whole and up to date; builds and writes nothing."""
    return _cached(config, _folder(config), source_files(config.data))


def _cached(config: Config, folder: Path, files: Sequence[Path]) -> TokenData | None:
    try:
        if _read_meta(folder).stamp != _stamp(files):
            return None
        data = open_folder(folder)
    except (UserError, OSError):  # none, damaged, or being replaced: `open_data` says which
        return None
    _check_lengths(config, data.train.n_tokens, data.val.n_tokens)
    return data


def kept_data(config: Config) -> TokenData | None:
    """The shards that lie there for the config, whole, though the text may have changed since.

    None where there are none or they are damaged; builds and writes nothing.
    """
    try:
        return open_folder(_folder(config))
    except (UserError, OSError):
        return None


class Validation(NamedTuple):
    """The validation tokens of a data folder, and what they are ids of."""

    split: Split
    tokenizer: Tokenizer
    folder: Path


def kept_validation(config: Config) -> Validation | None:
    """The same for the validation tokens alone: those of training may take minutes to verify."""
    folder = _folder(config)
    try:
        meta, tokenizer = _open_meta(folder)
        return Validation(_open_side(folder, meta, meta.val, tokenizer), tokenizer, folder)
    except (UserError, OSError):
        return None


def open_folder(folder: Path) -> TokenData:
    """Opens a data folder after verifying all of it; `UserError` on anything damaged."""
    meta, tokenizer = _open_meta(folder)
    return TokenData(
        _open_side(folder, meta, meta.train, tokenizer),
        _open_side(folder, meta, meta.val, tokenizer),
        tokenizer,
        folder,
        fingerprint=meta.fingerprint,
        source=meta.source,
        split=meta.split,
        parts={"text": meta.source_fingerprint, "tokenizer": meta.tokenizer_fingerprint},
    )


def _open_meta(folder: Path) -> tuple[Meta, Tokenizer]:
    meta, tokenizer = _read_meta(folder), load_tokenizer(folder)
    if tokenizer.fingerprint != meta.tokenizer_fingerprint:
        raise UserError(f"{folder}: damaged: its tokenizer is not the one that made the shards")
    return meta, tokenizer


def _open_side(folder: Path, meta: Meta, side: SplitMeta, tokenizer: Tokenizer) -> Split:
    fingerprints = (meta.tokenizer_fingerprint, meta.source_fingerprint)
    return open_split(folder, side, tokenizer.vocab_size, fingerprints)


class _NotThereError(UserError):
    """No data folder yet, as opposed to a damaged one."""


def _read_meta(folder: Path) -> Meta:
    if not (folder / META_FILE).exists():
        raise _NotThereError(f"{folder} holds no {META_FILE}; make it with gpt-data build")
    content = read_bounded(folder / META_FILE)
    whole = is_sealed(content)
    if whole is False:
        raise UserError(
            f"{folder / META_FILE}: damaged: its SHA-256 is not the one in it; build it again"
        )
    try:
        meta = Meta.model_validate_json(content)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{folder / META_FILE}: damaged at {place or 'its start'}; build it again"
        ) from None
    if meta.seal is not None and not whole:
        raise UserError(
            f"{folder / META_FILE}: damaged: does not begin with its SHA-256; build it again"
        )
    if meta.format != FORMAT:
        raise UserError(
            f"{folder}: of format {meta.format}, this version reads {FORMAT}; build it again"
        )
    return meta


def _folder(config: Config) -> Path:
    source = config.data.source if isinstance(config.data.source, str) else config.data.source[0]
    kind = config.tokenizer.kind
    if kind == "bpe":
        kind += str(config.tokenizer.vocab_size)
    words = [Path(source).stem or "text", Path(kind).stem if not is_tokenizer_kind(kind) else kind]
    name = "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.")[:40] or "text" for word in words)
    return Path(config.data.dir) / f"{name}-{_request(config)[:10]}"


def _request(config: Config) -> str:
    """A hash of everything in the config that decides what the shards hold."""
    data, tokenizer = config.data, config.tokenizer
    sources = [data.source] if isinstance(data.source, str) else data.source
    made_of: list[object] = [tokenizer.kind]
    if tokenizer.kind == "bpe":
        made_of += [tokenizer.vocab_size, tokenizer.split]
    elif not is_tokenizer_kind(tokenizer.kind):
        with named("tokenizer.kind"):
            ranks = read_bounded(ranks_path(tokenizer.kind))
        made_of = [hashlib.sha256(ranks).hexdigest(), tokenizer.split]
    request = [
        FORMAT,
        [
            source if source == STDLIB else str(Path(source).expanduser().absolute())
            for source in sources
        ],
        [data.text_field, data.encoding, data.val_fraction],
        made_of,
    ]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def _stamp(files: Sequence[Path]) -> str:
    """A hash of path, size and time of each file: equal as long as nobody touched them."""
    digest = hashlib.sha256()
    for file in files:
        stat = file_stat(file)
        digest.update(
            f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(
                "utf-8", "surrogateescape"
            )
        )
    return digest.hexdigest()


def _reuse(config: Config, folder: Path, files: Sequence[Path]) -> TokenData | None:
    """What is there, if it is whole and still that of the text."""
    try:
        meta, data = _read_meta(folder), open_folder(folder)
    except _NotThereError:
        return None
    except UserError as error:
        say(f"warning: {error}; building the shards again")
        return None
    stamp = _stamp(files)
    if meta.stamp != stamp:
        if scan(config.data, progress=False).fingerprint != meta.source_fingerprint:
            say(f"data: the text changed since {folder} was built; building it again")
            return None
        _write_meta(folder, meta.model_copy(update={"stamp": stamp}))
    _check_lengths(config, data.train.n_tokens, data.val.n_tokens)
    return data


def _memory(files: Sequence[Path]) -> AbstractContextManager[None]:
    """How to build shards of files: of much text without holding more the more there is.

    It costs a second in six; of little text, little is held anyway.
    """
    much = sum(file_stat(path).st_size for path in files) > MUCH_BYTES
    return freed_memory_given_back() if much else nullcontext()


def _build(config: Config, folder: Path, files: Sequence[Path], *, progress: bool) -> TokenData:
    """Scans, makes the tokenizer, tokenizes into a temporary folder, and puts that in place."""
    stamp = _stamp(files)
    corpus, tokenizer = make_tokenizer(config, progress=progress)
    identity = [corpus.fingerprint, tokenizer.fingerprint, config.data.val_fraction, FORMAT]
    identity += ["tails"] if corpus.partition.long else []  # these were whole before
    temporary, old = (folder.with_name(f".{word}-{folder.name}") for word in ("tmp", "old"))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()
    try:
        tokenizer.save(temporary)
        train, val = _tokenize(corpus, tokenizer, temporary, progress=progress)
        _check_lengths(config, train.n_tokens, val.n_tokens)
        meta = Meta(
            format=FORMAT,
            request=_request(config),
            stamp=stamp,
            fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            source=corpus.name,
            source_fingerprint=corpus.fingerprint,
            tokenizer_fingerprint=tokenizer.fingerprint,
            split=corpus.summary,
            train=train,
            val=val,
        )
        _write_meta(temporary, meta)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return open_folder(folder)


def make_tokenizer(config: Config, *, progress: bool = True) -> tuple[Corpus, Tokenizer]:
    """The scanned text and its tokenizer: a BPE learns from training text only, chars sees all."""
    kind = config.tokenizer.kind
    if kind not in ("chars", "bpe"):
        tokenizer = build_tokenizer(config.tokenizer, tuple)  # may fail, so before any long work
        return scan(config.data, progress=progress), tokenizer
    corpus = scan(config.data, progress=progress)
    if kind == "bpe":
        say(f"tokenizer: training a BPE of {config.tokenizer.vocab_size:,} ids")
    texts = partial(corpus.texts, train_only=kind == "bpe")
    return corpus, build_tokenizer(config.tokenizer, texts)


def _write_meta(folder: Path, meta: Meta) -> None:
    write_durably(folder / META_FILE, sealed(meta.model_dump(exclude={"seal"})))


def _check_lengths(config: Config, train_tokens: int, val_tokens: int) -> None:
    check_context(train_tokens, config.model.context_len)
    if val_tokens < 2:
        raise UserError(
            f"data.val_fraction {config.data.val_fraction}: the validation split has {val_tokens} "
            "tokens, it needs at least 2; raise data.val_fraction, or give more text"
        )


def _tokenize(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, *, progress: bool
) -> tuple[SplitMeta, SplitMeta]:
    """Tokenizes in threads (tiktoken works outside of the GIL) and writes both sides in order."""
    fingerprints = (tokenizer.fingerprint, corpus.fingerprint)
    sides = (
        ShardWriter(folder, "train", tokenizer.vocab_size, fingerprints),
        ShardWriter(folder, "val", tokenizer.vocab_size, fingerprints),
    )
    disable = None if progress else True
    try:
        with tqdm(
            total=corpus.n_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=disable
        ) as bar:
            for both in _encode_all(corpus, tokenizer):
                for writer, encoded in zip(sides, both, strict=True):
                    writer.write(encoded.ids)
                    writer.n_bytes += encoded.n_bytes
                    writer.n_documents += encoded.n_documents
                    bar.update(encoded.n_bytes)
        if corpus.partition.how == "tail":
            for writer in sides:
                writer.n_documents = corpus.n_documents
        return sides[0].close(), sides[1].close()
    finally:
        for writer in sides:
            writer.abandon()


class _Encoded(NamedTuple):
    ids: Ids
    n_bytes: int
    n_documents: int


def _encode_all(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[_Encoded, _Encoded]]:
    """Encodes tasks of pieces in parallel, in order, with a bounded number under way."""
    n_threads = min(MAX_THREADS, os.cpu_count() or 1)
    under_way: deque[Future[tuple[_Encoded, _Encoded]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for task in _tasks(corpus.pieces()):
                under_way.append(pool.submit(_encode_task, tokenizer, task))
                if len(under_way) > 2 * n_threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    task, size = [], 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text) + 1
        if size >= TASK_CHARS:
            yield task
            task, size = [], 0
    yield task


def _encode_task(tokenizer: Tokenizer, task: Sequence[Piece]) -> tuple[_Encoded, _Encoded]:
    def encode(pieces: list[Piece]) -> _Encoded:
        ids = tokenizer.encode_all(None if piece.ends else piece.text for piece in pieces)
        n_bytes = sum(len(piece.text.encode()) for piece in pieces)
        return _Encoded(ids, n_bytes, sum(piece.ends for piece in pieces))

    return encode([p for p in task if not p.val]), encode([p for p in task if p.val])


def _summary(data: TokenData) -> str:
    text = f"{data.source}: "
    for name, side in (("train", data.train), ("validation", data.val)):
        text += f"{side.n_tokens:,} tokens of {name} ({side.n_documents:,} documents), "
    return f"{text}{data.split}, in {data.folder}"
