"""Files become documents in a stable order, and cutting them does not change the ids."""

import csv
import errno
import json
import os
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import DataConfig, TokenizerConfig
from gpt.errors import UserError
from gpt.ranks import PATTERNS
from gpt.sources import READ_BYTES, cut_pieces, documents, read_text, source_files
from gpt.tokenizer import build_tokenizer

WORDS = [
    "the",
    " cat",
    "\n",
    "\n\n",
    " ",
    "/",
    "//",
    "!",
    "'s",
    "12345",
    "é",
    "字",
    "\r\n",
    "\t",
    "x",
]


def config(source: Path | str | list[str], **more: object) -> DataConfig:
    given = source if isinstance(source, list) else str(source)
    return DataConfig(source=given, **more)  # type: ignore[arg-type]


def texts(data: DataConfig) -> list[str]:
    return ["".join(document.pieces()) for document in documents(data)]


def tokenizer_for(split: str):
    text = "the cat's 12345 !! //\n/ x\r\n\n字é " * 30
    return build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=280, split=split), lambda: [text])


TOKENIZERS = {split: tokenizer_for(split) for split in PATTERNS}


@pytest.mark.parametrize("split", list(PATTERNS))
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=60),
    limit=st.integers(20, 60),
    chunk=st.integers(1, 50),
)
def test_pieces_have_the_ids_of_the_whole(split: str, words: list[str], limit: int, chunk: int):
    # A newline or space within reach of every cut: words shorter than the limit, separated.
    text = "".join(f"{word}a\nb c" for word in words)
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    pieces = list(cut_pieces(chunks, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert pieces == list(cut_pieces([text], limit))  # the chunks do not matter
    encode = TOKENIZERS[split].encode
    joined = np.concatenate([np.empty(0, np.uint32), *map(encode, pieces)])
    assert np.array_equal(joined, encode(text))


def test_text_without_a_place_to_cut_is_cut_at_the_limit():
    pieces = list(cut_pieces(["字" * 25], 10))
    assert [len(piece) for piece in pieces] == [10, 10, 5]


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert texts(config(tmp_path / "a.txt")) == ["one\r\ntwo\rthree\n"]


def test_characters_across_the_chunks_of_reading(tmp_path: Path):
    text = "a" + "字🙂" * (READ_BYTES // 3)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    chunks = list(read_text(tmp_path / "a.txt"))
    assert len(chunks) > 1
    assert "".join(chunks) == text


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "latin-1"])
def test_other_encodings(encoding: str, tmp_path: Path):
    text = "déjà" if encoding == "latin-1" else "你好 🙂"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert texts(config(tmp_path / "a.txt", encoding=encoding)) == [text]


@pytest.mark.parametrize("encoding", ["utf8000", "hex", "base64"])
def test_unknown_encodings_are_refused(encoding: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data\.encoding"):
        texts(config(tmp_path / "a.txt", encoding=encoding))


@pytest.mark.parametrize("before", [3, READ_BYTES - 1, READ_BYTES + 5])
def test_what_is_not_text_is_refused_with_its_place(before: int, tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * before + b"\xff" + b"b" * 10)
    with pytest.raises(UserError, match=rf"a\.txt: not utf-8 text: byte {before} is 0xff"):
        texts(config(path))
    path.write_bytes(b"a" * before + b"\0b")
    with pytest.raises(UserError, match=rf"a\.txt: not text: a NUL at byte {before};"):
        texts(config(path))


def test_a_character_cut_at_the_end_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("a字".encode()[:-1])
    with pytest.raises(UserError, match="byte 1 is 0xe5"):
        texts(config(tmp_path / "a.txt"))


def test_folders_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.txt", "a/z.md", "a/y.PY", ".hidden/x.txt", ".h.txt", "c.rst", "d.png"):
        path = tmp_path / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "t" / "a" / "loop").symlink_to(tmp_path / "t")
    assert texts(config(tmp_path / "t")) == ["a/y.PY", "a/z.md", "b.txt"]
    assert texts(config(tmp_path / "t" / "*.txt")) == ["b.txt"]
    assert texts(config(tmp_path / "t" / "**" / "*.md"))[:1] == ["a/z.md"]
    assert texts(config(tmp_path / "t" / "c.rst")) == ["c.rst"]
    both = [str(tmp_path / "t" / "b.txt"), str(tmp_path / "t"), str(tmp_path / "t" / "c.rst")]
    assert texts(config(both)) == ["b.txt", "a/y.PY", "a/z.md", "c.rst"]  # each file once
    monkeypatch.chdir(tmp_path)
    assert texts(config("t/b.txt")) == ["b.txt"]


def test_folders_of_runs_are_left_out(tmp_path: Path):
    for name in ("runs/mine/config.yaml", "runs/mine/metrics.jsonl", "runs/mine/checkpoints/a.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for name in ("runs/notes.txt", "set/config.yaml", "set/metrics.jsonl"):  # no run: of a data set
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "a row"}')
    names = ["runs/notes.txt", "set/metrics.jsonl"]
    assert source_files(config(tmp_path)) == [tmp_path / name for name in names]
    # The folder that is named is read, whatever it is.
    found = source_files(config(tmp_path / "runs" / "mine"))
    assert [file.name for file in found] == ["a.md", "metrics.jsonl"]


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("open", "closed", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    closed, scandir = {str(tmp_path / "closed"), str(tmp_path / ".hidden")}, os.scandir

    def scan(folder: str):  # for root, no folder is closed
        if folder in closed:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match=r"data\.source: .*/closed'; check the path") as error:
        source_files(config(tmp_path))
    assert len(error.value.lines) == 1
    closed.remove(str(tmp_path / "closed"))
    assert len(source_files(config(tmp_path))) == 2


def test_missing_sources_are_all_named_with_the_nearest(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    bad = [
        str(tmp_path / "corpsu.txt"), str(tmp_path / "*.md"), str(tmp_path / "empty"),
        "~nobody-here/x.txt",
    ]  # fmt: skip
    with pytest.raises(UserError) as error:
        source_files(config(bad))
    lines = error.value.lines
    assert len(lines) == len(bad)
    assert "does not exist; did you mean" in lines[0]
    assert lines[0].endswith("corpus.txt?")
    assert "matches no file" in lines[1]
    assert "holds no .txt" in lines[2]


def test_rows_are_documents(tmp_path: Path):
    rows = ["one\ntwo", "你好 🙂", "", 'with "quotes", and commas\r\n', "\ud83d"]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": r, "n": 1}) for r in rows))
    clean = [*rows[:-1], "�"]
    assert texts(config(tmp_path / "a.jsonl")) == clean
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["n", "body"], *([1, row] for row in clean)])
    assert texts(config(tmp_path / "a.csv", text_field="body")) == clean


def test_parquet_rows(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "你好 🙂"], "n": [1, 2, 3]}), path)
    assert texts(config(path)) == ["one", "", "你好 🙂"]
    with pytest.raises(UserError, match="row 1: n is int"):
        texts(config(path, text_field="n"))
    with pytest.raises(UserError, match=r"no field 'nope'.*text, n"):
        texts(config(path, text_field="nope"))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"not a readable \.parquet"):
        texts(config(path))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (["one"], "list<.*string>"),
        ({"one": "two"}, "struct<one: string>"),
        (datetime(2024, 1, 1), "timestamp"),
    ],
)
def test_parquet_columns_that_hold_more_than_a_text_are_refused(
    value: object, kind: str, tmp_path: Path
):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [value]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: text is {kind}.*, not text; name another"):
        texts(config(tmp_path / "a.parquet"))


def test_parquet_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    column = pa.array([b"fine", b"ok\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 2: not utf-8 text: byte 2 is 0xff; write"):
        texts(config(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="pip install"):
        texts(config(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:2: not valid JSON"),
        ("[1]", "a.jsonl:2: not an object"),
        ('{"body": "x", "n": 1}', "a.jsonl:2: no field 'text'.*body, n"),
        ('{"text": 3}', "a.jsonl:2: text is int, not text"),
        ("[" * 100_000, "a.jsonl:2: not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", "a.jsonl:2: not valid JSON"),
    ],
)
def test_bad_rows_are_named(line: str, message: str, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=message) as error:
        texts(config(tmp_path / "a.jsonl"))
    assert len(error.value.lines) == 1


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", 'text\n"open', 'text\n"a"b\n'])
def test_bad_csv_is_refused(content: str, tmp_path: Path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError):
        texts(config(tmp_path / "a.csv"))


@pytest.mark.parametrize(("row", "count"), [("1,one, and two", 3), ("1", 1)])
def test_csv_rows_of_another_length_than_the_header_are_refused(
    row: str, count: int, tmp_path: Path
):
    (tmp_path / "a.csv").write_text(f'n,text\n\n0,"fine, too"\n{row}\n')
    with pytest.raises(UserError, match=rf"a\.csv:4: {count} fields.* header has 2; .*quotes"):
        texts(config(tmp_path / "a.csv"))


def test_the_standard_library_is_there_in_a_stable_order():
    files = source_files(DataConfig())
    assert len(files) > 300
    names = [file.name for file in files]
    assert "argparse.py" in names
    assert not any({"site-packages", "test", "__pycache__"} & set(file.parts) for file in files)
    assert files == source_files(DataConfig())
