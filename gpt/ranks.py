"""The vocabularies of byte-level BPE: read from a file, published by tiktoken, or trained."""

import base64
import binascii
import difflib
import hashlib
import io
import os
import socket
import tempfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from gpt.errors import UserError

Ranks = dict[bytes, int]
Texts = Callable[[], Iterable[str]]

MAX_VOCAB = 2_000_000
# Text that a BPE is trained on, at most, and for each id. More of it finds no better words: of
# Python's library 2,048 ids of 4M characters or of all 10M take 2.947 and 2.952 bytes of unseen
# text each, 4,096 ids 3.319 and 3.312; of 2M they take 1.5 % less.
TRAIN_CHARS, CHARS_AN_ID = 50_000_000, 2000
SAMPLE_CHARS = 1 << 16

# How text is cut into words before merging. Source: tiktoken 0.14, tiktoken_ext/openai_public.py.
# Kept here, so that a checkpoint's ids do not depend on the version of tiktoken.
_LETTER_END = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_LETTER_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_LETTER_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# The same words, faster: where a pattern looks ahead, tiktoken's regex engine tries its parts one
# by one; a group of those that do not goes to a finite automaton, as a whole.
FAST_PATTERNS = {
    "gpt2": r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
    r"|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*)|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": "(?:" + PATTERNS["o200k_base"].replace(r"|\s+(?!\S)", r")|\s+(?!\S)"),
}
# Published vocabularies by their number of ranks: the pattern and the id of <|endoftext|>.
KNOWN = {
    50256: ("gpt2", 50256),
    50280: ("gpt2", 50256),
    100256: ("cl100k_base", 100257),
    199998: ("o200k_base", 199999),
}
_PORTS = {"http": 80, "https": 443}  # else that of SOCKS
_BLOB = "https://openaipublic.blob.core.windows.net"
_URLS = {
    "gpt2": (
        f"{_BLOB}/gpt-2/encodings/main/vocab.bpe",
        f"{_BLOB}/gpt-2/encodings/main/encoder.json",
    ),
    "cl100k_base": (f"{_BLOB}/encodings/cl100k_base.tiktoken",),
    "o200k_base": (f"{_BLOB}/encodings/o200k_base.tiktoken",),
}


def parse_ranks(content: bytes, path: Path) -> Ranks:
    """The ranks of a .tiktoken file: a line a token, its bytes in base64 and its id."""
    ranks: Ranks = {}
    for number, line in enumerate(io.BytesIO(content), 1):
        if number > MAX_VOCAB:
            raise UserError(
                f"{path}: more than {MAX_VOCAB:,} lines, the limit; give a .tiktoken file, or "
                "another tokenizer.kind"
            )
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number}: not a line of a ranks file (base64, space, id); "
                "give a .tiktoken file, or another tokenizer.kind"
            ) from None
        if not key or key in ranks or not 0 <= value < MAX_VOCAB:
            raise UserError(
                f"{path}:{number}: token empty or there twice, or id {value} not in "
                f"0..{MAX_VOCAB - 1}; fetch the file again"
            )
        ranks[key] = value
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{path}: an id is given to two tokens; fetch the file again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path}: no rank for {len(missing)} of the 256 single bytes (first: {missing[0]}), so "
            "some text would have no ids; give a byte-level ranks file"
        )
    return ranks


def ranks_path(kind: str) -> Path:
    """The ranks file that a `tokenizer.kind` names; `UserError` where there is none."""
    try:
        path = Path(kind).expanduser()
        if path.is_file():
            return path.resolve()
    except (OSError, RuntimeError, ValueError):
        pass
    names = ["bytes", "chars", "bpe", *PATTERNS]
    near = difflib.get_close_matches(kind, names, 1)
    hint = f"; did you mean {near[0]}?" if near else "; check the path"
    raise UserError(
        f"tokenizer.kind: {kind[:200]} is neither a file nor one of {', '.join(names)}{hint}"
    )


def train_ranks(size: int, split: str, texts: Texts) -> Ranks:
    """Trains a byte-level BPE of at most `size` tokens; a merge must occur at least twice.

    Source: Sennrich, Haddow, Birch 2016, by Hugging Face `tokenizers`, over bytes as in GPT-2.
    """
    from tokenizers import Regex, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE

    # Oniguruma reads `{1,3}+` as a repeated group and `$` as the end of a line.
    pattern = PATTERNS[split].replace("{1,3}+", "{1,3}").replace("$", r"\z")
    trainable = Trainable(BPE())
    trainable.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    trainable.train_from_iterator(_sample(texts, min(TRAIN_CHARS, CHARS_AN_ID * size)), trainer)
    return _to_bytes(trainable.get_vocab())


def _to_bytes(vocab: dict[str, int]) -> Ranks:
    """Undoes GPT-2's spelling of bytes as printable characters; ids keep their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(others)}
    ordered = sorted(vocab, key=lambda token: vocab[token])
    return {bytes(byte_of[char] for char in token): rank for rank, token in enumerate(ordered)}


def _sample(texts: Texts, most: int) -> Iterator[str]:
    """At most so many characters of the texts, in stretches of at most `SAMPLE_CHARS`.

    Of longer texts each period's end is taken, wherever one text ends and the next begins, so that
    every character has the same chance.
    """
    total, position = sum(map(len, texts())), 0
    if total <= most:
        for text in texts():
            for start in range(0, len(text), SAMPLE_CHARS):
                yield text[start : start + SAMPLE_CHARS]
        return
    period = -(-total * SAMPLE_CHARS // most)
    for text in texts():
        first = period - SAMPLE_CHARS - position % period  # below 0 in a stretch that goes on here
        for start in range(first, len(text), period):
            yield text[max(0, start) : start + SAMPLE_CHARS]
        position += len(text)


def published_ranks(kind: str) -> Ranks:
    """The ranks of a published kind, from tiktoken's cache or the network; else fails at once."""
    from tiktoken_ext.openai_public import (  # type: ignore[import-untyped]
        ENCODING_CONSTRUCTORS,
    )

    why = "they are not in tiktoken's cache"
    if _cached(kind) or _reachable(_BLOB):
        try:
            ranks: Ranks = ENCODING_CONSTRUCTORS[kind]()["mergeable_ranks"]
        except Exception as error:  # requests, OSError, a wrong hash: one remedy
            why = f"{type(error).__name__}"
        else:
            return ranks
    else:
        host, port = _door(_BLOB)
        why += f", and {host}:{port} does not answer"
    raise UserError(
        f"tokenizer.kind: {kind}: tiktoken cannot download its ranks here ({why}); put the ranks "
        "file on this machine and set tokenizer.kind to its path, or set TIKTOKEN_CACHE_DIR to a "
        "folder that holds tiktoken's downloads, or use kind: bpe"
    )


def _cached(kind: str) -> bool:
    """Whether tiktoken holds the files already; its cache names them by the SHA-1 of their URL."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    place = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    names = [hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest() for url in _URLS[kind]]
    return folder != "" and all((place / name).is_file() for name in names)


def _reachable(url: str, timeout_s: float = 3.0) -> bool:
    """Whether the host of a URL, or the proxy on the way, answers; bounded even where DNS hangs."""
    door, answered = _door(url), threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(door, timeout_s).close()
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answered.is_set()


def _door(url: str) -> tuple[str, int]:
    """Host and port that the way to a URL begins with: those of the proxy, where there is one."""
    proxies = urllib.request.getproxies()
    way = proxies.get("https") or proxies.get("all") or url
    with suppress(ValueError):
        target = urllib.parse.urlsplit(way if "://" in way else f"http://{way}")
        if target.hostname:
            return target.hostname, target.port or _PORTS.get(target.scheme, 1080)
    raise UserError(  # without its value, which may hold a password
        "https_proxy, or all_proxy: not the address of a proxy, like http://proxy.corp:3128; mend "
        "it, or unset it"
    )
