"""Every kind round-trips, is saved whole, and refuses what is damaged or hostile."""

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import ranks as ranks_module
from gpt.config import TokenizerConfig
from gpt.errors import UserError
from gpt.ranks import FAST_PATTERNS, PATTERNS, published_ranks
from gpt.tokenizer import (
    MARK,
    MAX_SPACES,
    Tokenizer,
    build_tokenizer,
    clean_text,
    load_tokenizer,
)

TEXT = (
    "The cat sat on the mat; the dog's 12345 days.\r\n\tif x == 3:\n" * 20
    + "你好,世界 🙂 déjà vu\n" * 5
)
GPT2 = Path(os.environ.get("GPT2_RANKS", "gpt2.tiktoken"))


def build(kind: str, texts: list[str] | None = None, **more: object) -> Tokenizer:
    config = TokenizerConfig(kind=kind, **more)  # type: ignore[arg-type]
    return build_tokenizer(config, lambda: [TEXT] if texts is None else texts)


def write_ranks(path: Path, merges: tuple[bytes, ...] = (b"th", b"the", b" the", b"!!")) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


BPE = {split: build("bpe", vocab_size=300, split=split) for split in PATTERNS}
BYTES = build("bytes")


@pytest.mark.parametrize("tokenizer", [BYTES, *BPE.values()], ids=["bytes", *BPE])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text_round_trips(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert b"".join(tokenizer.token_bytes(int(i)) for i in ids) == text.encode()
    assert tokenizer.eot_id not in ids


@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=st.text(min_size=1))
def test_chars_round_trips_what_it_was_built_from(text: str):
    tokenizer = build("chars", [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text)) + 1
    assert len(tokenizer.encode(text)) == len(text)


def test_chars_names_unseen_characters_and_the_fix():
    tokenizer = build("chars", ["abc"])
    with pytest.raises(UserError, match=r"'x' \(U\+0078\).*🙂.*bytes or bpe"):
        tokenizer.encode("ax🙂")
    with pytest.raises(UserError, match="and 15 more"):
        tokenizer.encode("abcdefghijklmnopqrstuvw")
    with pytest.raises(UserError):
        build("chars", []).encode("a")
    assert tokenizer.encode("").size == 0


@pytest.mark.parametrize("kind", ["bytes", "bpe", "chars", "ranks"])
def test_special_tokens_in_text_are_plain_text(kind: str, tmp_path: Path):
    text = "a<|endoftext|>b<|im_start|><|endofprompt|>"
    if kind == "ranks":
        kind = str(write_ranks(tmp_path / "my.tiktoken"))
    tokenizer = build(kind, [text], vocab_size=300)
    ids = tokenizer.encode(text)
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eot_id]) == ""
    assert tokenizer.byte_lengths[tokenizer.eot_id] == 0


def test_lone_surrogates_become_replacement_characters_and_pairs_are_joined():
    for tokenizer in (BYTES, BPE["gpt2"], build("chars", ["a�🙂"])):
        assert tokenizer.decode(tokenizer.encode("a\ud83d")) == "a�"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"
    assert clean_text("\udc80a") == "�a"


def test_cut_characters_decode_to_replacement():
    ids = BYTES.encode("🙂")
    assert BYTES.decode(ids[:2]) == "�"


def test_bpe_has_the_wished_size_with_the_end_token_last():
    tokenizer = BPE["gpt2"]
    assert tokenizer.vocab_size == 300
    assert tokenizer.eot_id == 299
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2


def test_bpe_takes_what_a_small_text_gives_and_says_so(capsys: pytest.CaptureFixture[str]):
    tokenizer = build("bpe", ["abab abab"], vocab_size=5000)
    assert 257 < tokenizer.vocab_size < 300
    assert f"only gives {tokenizer.vocab_size} ids" in capsys.readouterr().err


def test_bpe_training_is_repeatable_and_differs_between_texts():
    assert build("bpe", vocab_size=350).fingerprint == build("bpe", vocab_size=350).fingerprint
    other = build("bpe", [TEXT.upper()], vocab_size=350)
    assert other.fingerprint != build("bpe", vocab_size=350).fingerprint


def test_bpe_samples_long_texts_evenly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks_module, "SAMPLE_CHARS", 10)
    texts = [f"{number:04}" * 25 for number in range(100)]  # 10,000 characters
    parts = list(ranks_module._sample(lambda: texts, 1000))
    assert sum(map(len, parts)) in range(900, 1001)
    firsts = {int(part[:2]) for part in parts}  # the texts' numbers, in hundreds
    assert len({text for text in texts if any(part in text for part in parts)}) > 90
    assert firsts


def test_bpe_samples_long_and_short_texts_alike(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks_module, "SAMPLE_CHARS", 10)
    texts = ["a" * 10, "bcd"] * 1001
    sample = "".join(ranks_module._sample(lambda: texts, 1000))
    assert len(sample) in range(900, 1001)
    for letter, share in {"a": 10, "b": 1, "c": 1, "d": 1}.items():
        assert sample.count(letter) == pytest.approx(len(sample) * share / 13, rel=0.05)
    # Texts up to the limit are taken whole, each in stretches of its own.
    texts = ["e" * 25, "", "f" * 975]
    parts = list(ranks_module._sample(lambda: texts, 1000))
    assert "".join(parts) == "".join(texts)
    assert [*map(len, parts)] == [10, 10, 5, *[10] * 97, 5]


def test_a_bpe_reads_as_much_as_its_ids_need(monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    sample = ranks_module._sample

    def counted(texts: ranks_module.Texts, most: int) -> Iterator[str]:
        for part in sample(texts, most):
            read.append(len(part))
            yield part

    monkeypatch.setattr(ranks_module, "_sample", counted)
    monkeypatch.setattr(ranks_module, "SAMPLE_CHARS", 100)
    texts = ["the cat sat on the mat. " * 100] * 1000  # 2.4M characters
    ranks_module.train_ranks(300, "gpt2", lambda: texts)
    assert 0.99 * 600_000 < sum(read) <= 600_000
    monkeypatch.setattr(ranks_module, "TRAIN_CHARS", 300_000)
    read.clear()
    ranks_module.train_ranks(300, "gpt2", lambda: texts)
    assert 0.99 * 300_000 < sum(read) <= 300_000


@pytest.mark.parametrize("split", list(PATTERNS))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(alphabet=st.sampled_from("aZ'sS12345 \t\n\r./!é字🙂\u0301\u2028\x1c")))
def test_the_trainer_cuts_words_as_tiktoken_does(split: str, text: str):
    pattern = PATTERNS[split].replace("{1,3}+", "{1,3}").replace("$", r"\z")
    cutter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    words = [word for word, _ in cutter.pre_tokenize_str(text)]
    # `regex` knows possessive groups; in its syntax too, {1,3}+ is possessive as for tiktoken.
    assert words == [match.group() for match in regex.finditer(PATTERNS[split], text)]


@pytest.mark.parametrize("split", list(PATTERNS))
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(alphabet=st.sampled_from("aZ'sSrevl12345 \t\n\r./!é字🙂\u0301\u2028\x1cǅ½")))
def test_the_faster_patterns_give_the_same_words(split: str, text: str):
    words, fast = (
        [match.group() for match in regex.finditer(patterns[split], text)]
        for patterns in (PATTERNS, FAST_PATTERNS)
    )
    assert fast == words
    ranks = {BPE[split].token_bytes(rank): rank for rank in range(BPE[split].eot_id)}
    plain = tiktoken.Encoding(
        "plain", pat_str=PATTERNS[split], mergeable_ranks=ranks, special_tokens={}
    )
    assert BPE[split].encode(text).tolist() == plain.encode_ordinary(text)


@pytest.mark.parametrize("tokenizer", [BYTES, *BPE.values()], ids=["bytes", *BPE])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(st.none() | st.text(alphabet=st.sampled_from("\0end a's \n\ud83d\ude42"))))
def test_many_documents_at_once_get_the_ids_of_each(tokenizer, texts):
    parts = [[tokenizer.eot_id] if t is None else tokenizer.encode(t).tolist() for t in texts]
    assert tokenizer.encode_all(texts).tolist() == [each for part in parts for each in part]


def test_an_end_put_between_texts_is_found_where_it_was_put():
    assert not any(MARK.startswith(MARK[cut:]) for cut in range(1, len(MARK)))
    tokenizer = BPE["gpt2"]
    ids = tokenizer.encode_all([f"a{MARK}", None, MARK, None, "\0e", None, "nd"])
    assert ids.tolist().count(tokenizer.eot_id) == 3
    assert tokenizer.eot_id not in tokenizer.encode(f"a{MARK}b")


def test_patterns_are_those_of_the_installed_tiktoken(monkeypatch: pytest.MonkeyPatch):
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    for kind, pattern in PATTERNS.items():
        assert openai_public.ENCODING_CONSTRUCTORS[kind]()["pat_str"] == pattern


@pytest.mark.parametrize("tokenizer", list(BPE.values()), ids=list(BPE))
@pytest.mark.parametrize("run", ["a", " "])
def test_a_megabyte_of_one_letter_is_quick_and_round_trips(tokenizer: Tokenizer, run: str):
    text = run * 1_000_000 + "x"
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 10
    assert tokenizer.decode(ids) == text
    assert MAX_SPACES < 1_000_000


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "ranks"])
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path):
    if kind == "ranks":
        kind = str(write_ranks(tmp_path / "my.tiktoken"))
    tokenizer = build(kind, vocab_size=300)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    for name in ("kind", "vocab_size", "eot_id", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert np.array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    assert np.array_equal(loaded.byte_lengths, tokenizer.byte_lengths)
    assert str(tmp_path) not in (tmp_path / "saved" / "tokenizer.json").read_text()


def test_a_small_ranks_file(tmp_path: Path):
    tokenizer = build(str(write_ranks(tmp_path / "my.tiktoken")))
    assert tokenizer.vocab_size == 261
    assert tokenizer.eot_id == 260
    assert tokenizer.encode("the the!!").tolist() == [257, 258, 259]


def test_a_split_that_is_said_overrides_what_the_number_of_ranks_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = str(write_ranks(tmp_path / "my.tiktoken"))
    monkeypatch.setitem(ranks_module.KNOWN, 260, ("o200k_base", 300))
    assert build(path).eot_id == 300
    for split in PATTERNS:
        made = build_tokenizer(TokenizerConfig(kind=path, split=split), tuple)
        made.save(tmp_path / split)
        assert made.eot_id == 260  # as of a BPE that was trained here
        assert json.loads((tmp_path / split / "tokenizer.json").read_text())["split"] == split


@pytest.mark.skipif(not GPT2.exists(), reason="the ranks of GPT-2 are not on this machine")
def test_the_ranks_of_gpt2_give_gpt2s_ids():
    tokenizer = build(str(GPT2))
    assert tokenizer.vocab_size == 50257
    assert tokenizer.eot_id == 50256
    assert tokenizer.encode("Hello, world! 你好").tolist() == [
        15496, 11, 995, 0, 220, 19526, 254, 25001, 121,
    ]  # fmt: skip
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nYg== x\n", ":2: not a line"),
        (b"\x00\xff\n", ":1: not a line"),
        (b"YQ== 0\nYQ== 1\n", ":2: token empty or there twice"),
        (b"YQ== 99999999\n", ":1: .*not in 0"),
        (b"YQ== 0\nYg== 0\n", "two tokens"),
        (b"YQ== 0\n", "255 of the 256 single bytes"),
        (b"", "256 of the 256"),
    ],
)
def test_bad_ranks_files_are_refused_in_one_line(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build(str(path))
    assert len(error.value.lines) == 1


def test_a_missing_ranks_file_or_misspelt_kind_says_what_there_is(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean gpt2"):
        build("gtp2")
    for kind in (str(tmp_path / "no.tiktoken"), "~nobody-here/x"):
        with pytest.raises(UserError, match="neither a file nor one of bytes"):
            build(kind)


@pytest.mark.parametrize("kind", ["gpt2", "cl100k_base", "o200k_base"])
def test_without_network_it_fails_at_once_with_the_remedy(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"(?s)ranks file.*TIKTOKEN_CACHE_DIR.*kind: bpe"):
        build(kind)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("proxies", "door"),
    [
        ({}, ("example.com", 443)),
        ({"http": "http://proxy.corp:3128"}, ("example.com", 443)),
        ({"https": "proxy.corp:3128", "all": "http://other.corp:1"}, ("proxy.corp", 3128)),
        ({"all": "http://proxy.corp"}, ("proxy.corp", 80)),
        ({"https": "https://user:" + "secret@proxy.corp/"}, ("proxy.corp", 443)),
        ({"all": "socks5h://proxy.corp"}, ("proxy.corp", 1080)),
    ],
)
def test_the_way_to_the_network_leads_through_the_proxy(
    proxies: dict[str, str], door: tuple[str, int], monkeypatch: pytest.MonkeyPatch
):
    tried: list[tuple[str, int]] = []

    def connect(place: tuple[str, int], _: float) -> None:
        tried.append(place)
        raise OSError("no network here")

    monkeypatch.setattr(ranks_module.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(ranks_module.socket, "create_connection", connect)
    assert not ranks_module._reachable("https://example.com/a")
    assert tried == [door]


@pytest.mark.parametrize(
    "proxy", ["user:secret@[proxy", "http://user:" + "secret@proxy:high", "http://"]
)
def test_what_is_wrong_with_a_proxy_is_said_without_its_password(
    proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    proxies = {"https": proxy}
    monkeypatch.setattr(ranks_module.urllib.request, "getproxies", lambda: proxies)
    with pytest.raises(UserError, match=r"https_proxy.* not the address of a proxy") as error:
        build("gpt2")
    assert "secret" not in str(error.value)
    proxies["https"] = "user:secret@127.0.0.1:9"
    with pytest.raises(UserError, match=r"cache, and 127\.0\.0\.1:9 does not answer") as error:
        build("gpt2")
    assert "secret" not in str(error.value)


def test_a_hanging_network_is_given_up(monkeypatch: pytest.MonkeyPatch):
    def hang(*_: object) -> None:
        time.sleep(1)
        raise OSError("too late")

    monkeypatch.setattr(ranks_module.socket, "create_connection", hang)
    start = time.perf_counter()
    assert not ranks_module._reachable("https://example.invalid", timeout_s=0.1)
    assert time.perf_counter() - start < 0.9


def test_a_damaged_download_has_the_same_remedy(monkeypatch: pytest.MonkeyPatch):
    from tiktoken_ext import openai_public

    def damaged() -> None:
        raise ValueError("Hash mismatch")

    monkeypatch.setattr(ranks_module, "_cached", lambda _: True)
    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "gpt2", damaged)
    with pytest.raises(UserError, match=r"ValueError.*kind: bpe"):
        published_ranks("gpt2")


def test_published_ranks_come_from_tiktokens_cache(monkeypatch: pytest.MonkeyPatch):
    from tiktoken_ext import openai_public

    ranks = {bytes([byte]): byte for byte in range(256)}
    monkeypatch.setattr(ranks_module, "_cached", lambda _: True)
    for kind, eot_id in (("gpt2", 50256), ("cl100k_base", 100257), ("o200k_base", 199999)):
        monkeypatch.setitem(
            openai_public.ENCODING_CONSTRUCTORS, kind, lambda: {"mergeable_ranks": ranks}
        )
        tokenizer = build(kind)
        assert tokenizer.eot_id == eot_id
        assert tokenizer.vocab_size == eot_id + 1


def damage(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "magic"},
        {"kind": 3},
        {"format": 2},
        {"eot_id": 5},
        {"eot_id": True},
        {"eot_id": 10**12},
        {"eot_id": -1},
        {"vocab_size": 10**12},
        {"split": "(a+)+$"},
        {"split": None},
        {"kind": "chars", "chars": "ba"},
        {"kind": "chars", "chars": "\ud800"},
    ],
)
def test_damaged_tokenizers_are_refused(changes: dict[str, object], tmp_path: Path):
    BPE["gpt2"].save(tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[1]", "nul", "[" * 100_000, "\xff", '{"format": ' + "9" * 9999]
)
def test_other_json_is_refused(content: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path):
    BPE["gpt2"].save(tmp_path / "real")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "tokenizer.json").write_bytes((tmp_path / "real" / "tokenizer.json").read_bytes())
    (inside / "tokenizer.tiktoken").symlink_to(tmp_path / "real" / "tokenizer.tiktoken")
    with pytest.raises(UserError, match="inside its folder"):
        load_tokenizer(inside)
    with pytest.raises(UserError, match="missing"):
        load_tokenizer(tmp_path / "nowhere")


def test_huge_files_are_refused_unread(tmp_path: Path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="over 16,777,216 bytes"):
        load_tokenizer(tmp_path)
