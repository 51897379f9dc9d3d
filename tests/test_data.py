"""Shards are built once, found again, and rebuilt when text, tokenizer or files changed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt import data as data_module
from gpt.config import Config
from gpt.data import TokenData, cached_data, open_data, open_folder
from gpt.errors import UserError
from gpt.shards import ShardWriter

LINES = "The quick brown fox; 你好 🙂 <|endoftext|> number {0}.\r\n"
Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A config over some rows or a text, with changes by section."""
    rows = [LINES.format(number) * (1 + number % 7) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "one.txt").write_text("".join(rows), encoding="utf-8", newline="")

    def config(source: str = "rows.jsonl", kind: str = "bytes", **more: object) -> Config:
        data = {"source": str(tmp_path / source), "dir": str(tmp_path / "data")}
        return Config.model_validate(
            {
                "data": data | more,
                "tokenizer": {"kind": kind, "vocab_size": 300},
                "model": {"context_len": 16},
            }
        )

    return config


def ids_of(data: TokenData) -> tuple[list[int], list[int]]:
    return tuple(side.read(0, side.n_tokens).tolist() for side in (data.train, data.val))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_documents_end_with_the_end_token(kind: str, make: Make, tmp_path: Path):
    data = open_data(make(kind=kind), progress=False)
    rows = [json.loads(x)["text"] for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = []
    for side, ids in zip((data.train, data.val), ids_of(data), strict=True):
        eot = data.tokenizer.eot_id
        assert ids[-1] == eot
        assert ids.count(eot) == side.n_documents
        text = "".join("\0" if i == eot else data.tokenizer.decode([i]) for i in ids)
        if kind == "chars":
            found += text.split("\0")[:-1]
        assert side.n_bytes == int(data.tokenizer.byte_lengths[ids].sum())
    if kind == "chars":
        assert sorted(found) == sorted(rows)
    assert data.train.n_documents + data.val.n_documents == 60


def test_one_document_has_its_tail_for_validation_and_no_end_token(make: Make, tmp_path: Path):
    data = open_data(make("one.txt", "chars"), progress=False)
    text = (tmp_path / "one.txt").read_bytes().decode()
    cut = int(len(text) * 0.9)
    train, val = ids_of(data)
    assert data.tokenizer.decode(train) == text[:cut]
    assert data.tokenizer.decode(val) == text[cut:]
    assert (data.train.n_documents, data.val.n_documents) == (1, 1)
    assert data.tokenizer.eot_id not in train + val


def test_long_documents_are_cut_and_both_parts_end_with_the_end_token(make: Make, tmp_path: Path):
    (tmp_path / "two").mkdir()
    texts = ["abcdefghij" * 20, "klmnopqrst" * 30]
    for number, text in enumerate(texts):
        (tmp_path / "two" / f"{number}.txt").write_text(text)
    data = open_data(make("two", "chars"), progress=False)
    eot = data.tokenizer.eot_id
    parts = [
        "".join("|" if i == eot else data.tokenizer.decode([i]) for i in ids)
        for ids in ids_of(data)
    ]
    assert parts == [
        f"{texts[0][:180]}|{texts[1][:270]}|",
        f"{texts[0][180:]}|{texts[1][270:]}|",
    ]
    assert (data.train.n_documents, data.val.n_documents) == (2, 2)


def test_fingerprints_of_whole_documents_are_those_of_earlier_versions(make: Make):
    data = open_data(make(), progress=False)
    assert data.split == "validation: whole documents, 7 distinct of 60"
    assert data.fingerprint == "eb8c9e52c1d96f8a0e426d180d3f161511cb0d254398e00665338fc9742877c0"


def test_fingerprints_of_long_documents_are_others_than_in_earlier_versions(
    make: Make, tmp_path: Path
):
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.txt").write_text(name * 300)
    data = open_data(make("two"), progress=False)
    before = [data.parts["text"], data.parts["tokenizer"], 0.1, 1]
    assert data.fingerprint != hashlib.sha256(json.dumps(before).encode()).hexdigest()


def test_threads_and_small_tasks_keep_the_order(make: Make, monkeypatch: pytest.MonkeyPatch):
    whole = ids_of(open_data(make(kind="bpe"), progress=False))
    monkeypatch.setattr(data_module, "TASK_CHARS", 64)
    monkeypatch.setattr(data_module.os, "cpu_count", lambda: 8)
    again = open_data(make(kind="bpe", dir=make().data.dir + "2"), progress=False)
    assert ids_of(again) == whole


def test_built_once_then_reused_and_cached(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert cached_data(make()) is None
    assert not Path(make().data.dir).exists()
    built = open_data(make(), progress=False)
    assert "data: built" in capsys.readouterr().err
    monkeypatch.setattr(data_module, "scan", None)  # neither reads the text again
    reused = open_data(make(), progress=False)
    assert "data: reused" in capsys.readouterr().err
    cached = cached_data(make())
    assert cached is not None
    assert ids_of(cached) == ids_of(reused) == ids_of(built)
    assert cached.fingerprint == reused.fingerprint == built.fingerprint


def test_fingerprint_is_of_the_content_not_of_places_and_times(make: Make, tmp_path: Path):
    first = open_data(make(), progress=False)
    moved = tmp_path / "elsewhere" / "other-name.jsonl"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    config = make("elsewhere/other-name.jsonl", dir=str(tmp_path / "elsewhere" / "data"))
    assert open_data(config, progress=False).fingerprint == first.fingerprint
    others = [make(kind="chars"), make(val_fraction=0.2), make("one.txt")]
    fingerprints = {open_data(other, progress=False).fingerprint for other in others}
    assert len(fingerprints | {first.fingerprint}) == 4


def test_a_touched_file_is_recognised_a_changed_one_is_rebuilt(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = open_data(make(), progress=False)
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    assert cached_data(make()) is None
    assert open_data(make(), progress=False).fingerprint == first.fingerprint
    assert "data: reused" in capsys.readouterr().err
    assert cached_data(make()) is not None
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    changed = open_data(make(), progress=False)
    assert "the text changed" in capsys.readouterr().err
    assert changed.fingerprint != first.fingerprint
    assert changed.train.n_documents + changed.val.n_documents == 61
    assert [p.name for p in Path(make().data.dir).iterdir() if p.name[0] != "."] == [
        changed.folder.name
    ]


def test_a_changed_ranks_file_is_another_tokenizer(make: Make, tmp_path: Path):
    open_data(make(kind="bpe"), progress=False).tokenizer.save(tmp_path / "t")
    ranks = tmp_path / "t" / "tokenizer.tiktoken"
    first = open_data(make(kind=str(ranks)), progress=False)
    lines = ranks.read_bytes().splitlines(keepends=True)
    ranks.write_bytes(b"".join(lines[:280]))
    assert open_data(make(kind=str(ranks)), progress=False).fingerprint != first.fingerprint


@pytest.mark.parametrize("victim", ["train-00000.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_rebuilt_loudly_and_refused_when_opened_directly(
    victim: str, how: str, make: Make, capsys: pytest.CaptureFixture[str]
):
    data = open_data(make(kind="bpe"), progress=False)
    before = ids_of(data)
    path = data.folder / victim
    content = path.read_bytes()
    capsys.readouterr()
    if how == "flip":
        path.write_bytes(content[:20] + bytes([content[20] ^ 64]) + content[21:])
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        open_folder(data.folder)
    assert len(error.value.lines) == 1
    again = open_data(make(kind="bpe"), progress=False)
    shown = capsys.readouterr().err
    assert ("warning: " in shown and "building the shards again" in shown) or victim == "meta.json"
    assert ids_of(again) == before
    assert open_folder(again.folder).fingerprint == again.fingerprint


def test_a_tokenizer_that_is_not_the_shards_is_refused(make: Make):
    data = open_data(make(), progress=False)
    other = open_data(make(kind="bpe"), progress=False)
    other.tokenizer.save(data.folder)
    with pytest.raises(UserError, match="tokenizer is not the one"):
        open_folder(data.folder)


def test_a_shard_name_cannot_lead_out_of_the_folder(make: Make):
    data = open_data(make(), progress=False)
    meta = json.loads((data.folder / "meta.json").read_text())
    meta["train"]["shards"][0]["name"] = "../train-00000.bin"
    (data.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"damaged at train\.shards\.0\.name"):
        open_folder(data.folder)


def test_two_builders_at_once_build_once(make: Make, capsys: pytest.CaptureFixture[str]):
    results: list[TokenData] = []

    def build() -> None:
        results.append(open_data(make(kind="bpe"), progress=False))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown = capsys.readouterr().err
    assert shown.count("data: built") == 1
    assert shown.count("data: reused") == 3
    assert len({data.fingerprint for data in results}) == 1


def test_a_failed_build_leaves_nothing_and_keeps_what_was_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = open_data(make(), progress=False)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(UserError, match=r"data\.dir.*No space left"):
            open_data(make(), progress=False)
    assert open_folder(data.folder).fingerprint == data.fingerprint
    assert not [p for p in Path(make().data.dir).iterdir() if p.name.startswith((".tmp", ".old"))]


def test_killed_while_building_the_next_start_is_clean(make: Make, tmp_path: Path):
    config = make(kind="bpe")
    script = (
        "import os, sys\n"
        "from gpt import data\n"
        "from gpt.config import Config\n"
        "data._write_meta = lambda *_: os._exit(9)\n"
        "data.open_data(Config.model_validate_json(sys.argv[1]), progress=False)\n"
    )
    command = [sys.executable, "-c", script, config.model_dump_json()]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 9
    left = [path.name for path in Path(config.data.dir).iterdir()]
    assert any(name.startswith(".tmp-") for name in left)
    data = open_data(config, progress=False)
    assert data.train.n_tokens
    left = [path.name for path in Path(config.data.dir).iterdir()]
    assert not any(name.startswith((".tmp-", ".old-")) for name in left)


def test_too_little_text_is_refused_before_anything_is_written(make: Make, tmp_path: Path):
    (tmp_path / "tiny.txt").write_text("tiny text")
    with pytest.raises(UserError, match=r"context_len 16.*8 tokens.*at least 17"):
        open_data(make("tiny.txt"), progress=False)
    (tmp_path / "tiny.txt").write_text("x" * 18)
    with pytest.raises(UserError, match=r"val_fraction 0\.01.* 1 tokens, it needs at least 2"):
        open_data(make("tiny.txt", val_fraction=0.01), progress=False)
    assert not [p for p in (tmp_path / "data").iterdir() if not p.name.startswith(".lock")]


def test_a_missing_source_or_bad_tokenizer_leaves_no_folder(make: Make, tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        open_data(make("nowhere.txt"))
    with pytest.raises(UserError, match="neither a file nor one of"):
        open_data(make(kind="no.tiktoken"))
    with pytest.raises(UserError):
        cached_data(make("nowhere.txt"))
    assert not (tmp_path / "data").exists()


def test_what_the_tokenizer_does_not_read_does_not_rebuild(make: Make):
    first = open_data(make(), progress=False)
    other = make()
    other = other.model_copy(
        update={"tokenizer": other.tokenizer.model_copy(update={"vocab_size": 999})}
    )
    assert open_data(other, progress=False).folder == first.folder


def test_large_vocabularies_use_four_bytes(make: Make, tmp_path: Path):
    text = "".join(map(chr, range(0x4E00, 0x9FFF))) + "".join(map(chr, range(0x20000, 0x2A6DF)))
    text += "".join(map(chr, range(0xAC00, 0xD7A3)))
    (tmp_path / "many.txt").write_text(text * 2, encoding="utf-8")
    data = open_data(make("many.txt", "chars"), progress=False)
    assert data.tokenizer.vocab_size == len(text) + 1 > 65_536
    assert data.train.arrays[0].dtype == np.uint32
    train, val = ids_of(data)
    assert data.tokenizer.decode(train + val) == text * 2


def test_no_byte_of_meta_json_can_change_unseen(make: Make):
    data = open_data(make(), progress=False)
    path = data.folder / "meta.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError):
            open_folder(data.folder)
    path.write_bytes(whole)
    assert open_folder(data.folder).parts == data.parts


def test_a_meta_json_without_a_seal_is_that_of_an_older_version(make: Make):
    data = open_data(make(), progress=False)
    path = data.folder / "meta.json"
    meta = json.loads(path.read_bytes())
    del meta["seal"]
    path.write_text(json.dumps(meta, indent=1))
    assert open_folder(data.folder).fingerprint == data.fingerprint
