"""Text to ids and back, by five kinds of vocabulary; knows nothing of files of text or batches.

Text that looks like a special token is plain text here: the only special id, the end token, is
never the outcome of `encode`. Lone surrogates, which no file can hold, become U+FFFD.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt.config import TokenizerConfig, is_tokenizer_kind
from gpt.configfile import named
from gpt.errors import UserError, say
from gpt.files import read_plain
from gpt.ranks import (
    FAST_PATTERNS,
    KNOWN,
    MAX_VOCAB,
    PATTERNS,
    Ranks,
    Texts,
    parse_ranks,
    published_ranks,
    ranks_path,
    train_ranks,
)

Ids = npt.NDArray[np.uint32]
JSON_FILE, RANKS_FILE = "tokenizer.json", "tokenizer.tiktoken"
MAX_FILE_BYTES = 64 * 2**20
MAX_JSON_BYTES = 16 * 2**20  # every character there is, each escaped, is less
# Stands for the end of a document where many go to tiktoken in one call. No end of it is also a
# beginning, so that it stands nowhere but where it was put, or in a text that holds it whole.
MARK = "\0end"
MAX_SPACES = 100_000  # longer runs of whitespace overflow the stack of tiktoken's regex engine


class Tokenizer:
    """A vocabulary. `vocab_size` counts the end token; `byte_lengths` is (vocab_size,) int64."""

    def __init__(
        self,
        kind: str,
        tokens: Sequence[bytes],
        eot_id: int,
        encode: Callable[[str], Ids],
        files: dict[str, bytes],
        encode_marked: Callable[[str], Ids] | None = None,
    ) -> None:
        """Takes each id's bytes, how to encode clean text, and the files that `save` writes.

        `encode_marked` may encode several texts at once: each MARK in it becomes the end token.
        """
        self.kind = kind
        self.vocab_size = len(tokens)
        self.eot_id = eot_id
        self.byte_lengths = np.array([len(token) for token in tokens], dtype=np.int64)
        self._tokens, self._encode, self._files = tokens, encode, files
        self._encode_marked = encode_marked
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> Ids:
        """The ids of a text. `UserError` where it has characters that kind chars never saw."""
        return self._encode(clean_text(text))

    def encode_all(self, texts: Iterable[str | None]) -> Ids:
        """The ids of texts, one after another, each encoded by itself; None is the end token.

        Many short documents cost one call: a call waits for the interpreter, with other threads.
        """
        parts, run = [np.empty(0, np.uint32)], list[str | None]()
        for text in texts:
            if text is not None and run and run[-1] is not None:
                parts.append(self._encode_run(run))
                run = []
            run.append(text)
        return np.concatenate([*parts, self._encode_run(run)])

    def _encode_run(self, run: Sequence[str | None]) -> Ids:
        """The same for texts with an end between each two of them."""
        if self._encode_marked is not None:
            marked = clean_text("".join(MARK if text is None else text for text in run))
            if marked.count(MARK) == sum(text is None for text in run):
                return self._encode_marked(marked)
        end = np.array([self.eot_id], dtype=np.uint32)
        return np.concatenate([end[:0], *(end if t is None else self.encode(t) for t in run)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; what is not valid UTF-8 (a cut character) becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that an id stands for; none for the end token."""
        assert token_id >= 0, token_id
        return self._tokens[token_id]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, and tokenizer.tiktoken where there are ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


def clean_text(text: str) -> str:
    """The text without surrogates: pairs become their character, lone ones U+FFFD."""
    if text.isascii():  # known without a look at it
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def build_tokenizer(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    """Makes the tokenizer that the config asks for; only kinds chars and bpe read the texts."""
    match config.kind:
        case "bytes":
            return _bytes_tokenizer()
        case "chars":
            seen: set[str] = set()
            for text in texts():
                seen.update(clean_text(text))
            return _chars_tokenizer("".join(sorted(seen)))
        case "bpe":
            split = "gpt2" if config.split == "auto" else config.split
            ranks = train_ranks(config.vocab_size - 1, split, lambda: map(clean_text, texts()))
            if len(ranks) + 1 < config.vocab_size:
                say(
                    f"tokenizer.vocab_size {config.vocab_size}: the text only gives "
                    f"{len(ranks) + 1} ids; going on with these"
                )
            return ranks_tokenizer("bpe", ranks, split, len(ranks))
        case kind if is_tokenizer_kind(kind):
            return ranks_tokenizer(kind, published_ranks(kind), kind, _eot_of(kind))
        case _:
            return _file_tokenizer(config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads what `save` wrote; checks sizes, types, ranges: the folder may be a stranger's."""
    path = folder / JSON_FILE
    try:
        meta = json.loads(read_bounded(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        raise _damaged(path, "not valid JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != 1:
        raise _damaged(path, "not of format 1")
    match meta:
        case {"kind": "bytes"}:
            tokenizer = _bytes_tokenizer()
        case {"kind": "chars", "chars": str(chars)}:
            if list(chars) != sorted(set(chars)) or clean_text(chars) != chars:
                raise _damaged(path, "chars must be sorted, and each there once")
            tokenizer = _chars_tokenizer(chars)
        case {"kind": str(kind), "split": str(split), "eot_id": int(eot_id)}:
            if split not in PATTERNS or kind not in ("bpe", "ranks", *PATTERNS):
                raise _damaged(path, "kind or split unknown")
            ranks = parse_ranks(read_bounded(folder / RANKS_FILE), folder / RANKS_FILE)
            if (
                not max(ranks.values()) < MAX_VOCAB
                or not 0 <= eot_id < MAX_VOCAB
                or eot_id in ranks.values()
            ):
                raise _damaged(path, f"eot_id {eot_id} is not a free id below {MAX_VOCAB}")
            tokenizer = ranks_tokenizer(kind, ranks, split, eot_id)
        case _:
            raise _damaged(path, "kind unknown, or a key missing")
    if meta.get("vocab_size") != tokenizer.vocab_size or meta.get("eot_id") != tokenizer.eot_id:
        raise _damaged(path, "vocab_size or eot_id is not that of the vocabulary")
    return tokenizer


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: {why}; take the tokenizer from another checkpoint, or build it again"
    )


def _json(kind: str, vocab_size: int, eot_id: int, **more: str) -> bytes:
    head = {"format": 1, "kind": kind, "vocab_size": vocab_size, "eot_id": eot_id}
    return json.dumps(head | more, ensure_ascii=False, indent=1).encode() + b"\n"


def _bytes_tokenizer() -> Tokenizer:
    def encode(text: str) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    tokens = [bytes([byte]) for byte in range(256)] + [b""]
    return Tokenizer("bytes", tokens, 256, encode, {JSON_FILE: _json("bytes", 257, 256)})


def _chars_tokenizer(chars: str) -> Tokenizer:
    codes = np.frombuffer(chars.encode("utf-32-le"), dtype="<u4")

    def encode(text: str) -> Ids:
        given = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = np.searchsorted(codes, given)
        unseen = (
            codes[np.minimum(ids, len(codes) - 1)] != given
            if len(codes)
            else np.ones_like(given, bool)
        )
        if unseen.any():
            names = [f"{chr(code)!r} (U+{code:04X})" for code in np.unique(given[unseen])]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise UserError(
                f"not among the {len(codes)} characters of this tokenizer: {shown}; "
                "leave them out, or train with tokenizer.kind bytes or bpe, which know all"
            )
        return ids.astype(np.uint32)

    tokens = [char.encode() for char in chars] + [b""]
    files = {JSON_FILE: _json("chars", len(tokens), len(chars), chars=chars)}
    return Tokenizer("chars", tokens, len(chars), encode, files)


def ranks_tokenizer(kind: str, ranks: Ranks, split: str, eot_id: int) -> Tokenizer:
    """The tokenizer of a vocabulary; `split` names the pattern that cuts text into words."""
    import tiktoken

    # One special token, which `encode` does not allow: whatever stands in the text is plain text.
    # Without any, tiktoken looks for the empty word, and finds it at every character.
    encoding = tiktoken.Encoding(
        kind,
        pat_str=FAST_PATTERNS[split],
        mergeable_ranks=ranks,
        special_tokens={MARK: eot_id},
    )

    def encode(text: str) -> Ids:
        return _cut_if_stuck(partial(encoding.encode_to_numpy, disallowed_special=()), text)

    def encode_marked(text: str) -> Ids:
        to_ids = partial(encoding.encode_to_numpy, allowed_special={MARK}, disallowed_special=())
        return _cut_if_stuck(to_ids, text)

    tokens = [b""] * (max(eot_id, max(ranks.values())) + 1)
    for token, rank in ranks.items():
        tokens[rank] = token
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    files = {
        JSON_FILE: _json(kind, len(tokens), eot_id, split=split),
        RANKS_FILE: b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank),
    }
    return Tokenizer(kind, tokens, eot_id, encode, files, encode_marked)


def _cut_if_stuck(to_ids: Callable[[str], Ids], text: str) -> Ids:
    """The ids of a text; over-long whitespace, which fills the regex engine's stack, is cut."""
    try:
        return to_ids(text)
    except ValueError:
        parts = re.split(rf"(\s{{{MAX_SPACES}}})", text)
        if len(parts) == 1:
            raise
        return np.concatenate([_cut_if_stuck(to_ids, part) for part in parts if part])


@named("tokenizer.kind")
def _file_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A vocabulary from the user's own ranks file; nothing is guessed where a split is given."""
    path = ranks_path(config.kind)
    ranks = parse_ranks(read_bounded(path), path)
    split: str = config.split
    eot_id = max(ranks.values()) + 1
    if split == "auto":
        split, published_eot = KNOWN.get(len(ranks), ("gpt2", eot_id))
        eot_id = eot_id if published_eot in ranks.values() else published_eot
    if eot_id >= MAX_VOCAB:
        raise UserError(
            f"{path}: its ids go up to {eot_id - 1}, and none below {MAX_VOCAB} is left for the "
            "end of a text; give another ranks file"
        )
    return ranks_tokenizer("ranks", ranks, split, eot_id)


def _eot_of(kind: str) -> int:
    return next(eot_id for split, eot_id in KNOWN.values() if split == kind)


def read_bounded(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Reads a small file that must lie in its folder: no link out of it, no device, no flood."""
    try:
        if path.resolve().parent != path.parent.resolve() or not path.is_file():
            raise UserError(f"{path}: missing, or not a plain file inside its folder; restore it")
        return read_plain(path, limit)
    except RuntimeError:  # Python until 3.13 says so of a link that leads to itself
        raise UserError(f"{path}: a link that leads to itself; restore the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; restore it") from None
