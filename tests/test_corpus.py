"""No text stands on both sides of the split, and memory does not grow with the text."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from gpt import corpus as corpus_module
from gpt import sources
from gpt.config import DataConfig
from gpt.corpus import scan
from gpt.errors import UserError

SHAKESPEARE = Path(os.environ.get("TINYSHAKESPEARE", "tinyshakespeare.txt"))


def write_rows(path: Path, rows: list[str]) -> DataConfig:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return DataConfig(source=str(path))


def sides(data: DataConfig) -> tuple[list[str], list[str]]:
    """The documents of each side, and what each has of those that are cut."""
    result: tuple[list[str], list[str]] = ([], [])
    text = ["", ""]
    for piece in scan(data, progress=False).pieces():
        text[piece.val] += piece.text
        if piece.ends:
            result[piece.val].append(text[piece.val])
            text[piece.val] = ""
    assert text == ["", ""]
    return result


def test_whole_documents_in_the_wished_share(tmp_path: Path):
    rows = [f"document {number} " + "x" * (number % 50) for number in range(1000)]
    train, val = sides(write_rows(tmp_path / "a.jsonl", rows))
    assert sorted(train + val) == sorted(rows)
    assert not set(train) & set(val)
    assert train == [row for row in rows if row in set(train)]  # the order stays
    assert sum(map(len, val)) == pytest.approx(0.1 * sum(map(len, rows)), rel=0.02)


def test_copies_stay_on_one_side(tmp_path: Path):
    rows = [f"text {number % 40}" for number in range(400)]
    train, val = sides(write_rows(tmp_path / "a.jsonl", rows))
    assert val
    assert not set(train) & set(val)
    assert len(train) + len(val) == 400


LONG = [f"{letter}bcdefgh " * 3000 for letter in "abcde"]
NOTES = [f"a note, {number:03}\n" for number in range(500)]


def test_of_long_documents_both_sides_get_a_part(tmp_path: Path):
    rows = [*LONG[:2], *NOTES, *LONG[2:]]
    data = write_rows(tmp_path / "a.jsonl", rows)
    train, val = sides(data)
    # Heads and tails, joined, give every text back, in order; each note stands on one side.
    heads, tails = ([text for text in side if len(text) > 20] for side in (train, val))
    assert [head + end for head, end in zip(heads, tails, strict=True)] == LONG
    assert {len(end) for end in tails} == {2700}
    notes = [text for text in train if len(text) < 20], [text for text in val if len(text) < 20]
    assert sorted(notes[0] + notes[1]) == NOTES
    assert len(notes[1]) == 50
    assert train == [text for text in (*heads[:2], *NOTES, *heads[2:]) if text not in notes[1]]
    assert scan(data, progress=False).summary == (
        "validation: whole documents, 50 distinct of 500, and the last 10.00% of the characters of "
        "5 long documents"
    )


def test_a_small_file_beside_a_long_one_is_not_all_of_validation(tmp_path: Path):
    data = write_rows(tmp_path / "a.jsonl", ["long " * 1000, "read me"])
    assert sides(data) == (["long " * 900, "read me"], ["long " * 100])
    assert scan(data, progress=False).summary == (
        "validation: the last 10.00% of the characters of 1 long document"
    )


def test_of_two_equal_ones_both_are_cut(tmp_path: Path):
    train, val = sides(write_rows(tmp_path / "a.jsonl", ["abcdefghij", "klmnopqrst"]))
    assert (train, val) == (["abcdefghi", "klmnopqrs"], ["j", "t"])


def test_copies_of_a_long_one_are_cut_alike(tmp_path: Path):
    rows = [LONG[0], "note", LONG[0], " ", LONG[0], "another note"]
    train, val = sides(write_rows(tmp_path / "a.jsonl", rows))
    head, end = LONG[0][:24300], LONG[0][24300:]
    assert (train, val) == ([head, "note", head, head, "another note"], [end] * 3)


def test_one_between_long_and_small_does_not_leave_validation_to_the_small(tmp_path: Path):
    train, val = sides(
        write_rows(tmp_path / "a.jsonl", [LONG[0] * 5, LONG[1][:13500], *NOTES[:300]])
    )
    # It is below a tenth of all bytes, and above a tenth of what is left beside the long one.
    assert LONG[1][:13500] in train
    assert len([text for text in val if text in NOTES]) == 30


def test_the_split_does_not_depend_on_order_or_place(tmp_path: Path):
    rows = [f"document {number}" for number in range(200)]
    first = scan(write_rows(tmp_path / "a.jsonl", rows), progress=False)
    again = scan(write_rows(tmp_path / "b.jsonl", rows), progress=False)
    reordered = scan(write_rows(tmp_path / "c.jsonl", rows[::-1]), progress=False)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != reordered.fingerprint
    assert first.partition == again.partition == reordered.partition


def test_too_many_documents_for_a_list_are_split_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus_module, "MAX_SORTED_DOCUMENTS", 100)
    rows = [f"document {number % 1500}" for number in range(2000)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    assert scan(data, progress=False).partition.how == "hash"
    train, val = sides(data)
    assert not set(train) & set(val)
    assert len(val) / 2000 == pytest.approx(0.1, abs=0.03)


def tail(data: DataConfig) -> tuple[str, str]:
    corpus = scan(data, progress=False)
    assert corpus.partition.how == "tail"
    pieces = list(corpus.pieces())
    return tuple("".join(p.text for p in pieces if p.val is val) for val in (False, True))  # type: ignore[return-value]


def test_one_document_is_cut_by_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "字🙂ab\r\n" * 100_001
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    cut = int(len(text) * (1 - 0.3))
    data = DataConfig(source=str(tmp_path / "a.txt"), val_fraction=0.3)
    assert tail(data) == (text[:cut], text[cut:])
    (tmp_path / "b.txt").write_text("  \n")  # blank documents do not count
    data = DataConfig(source=str(tmp_path), val_fraction=0.3)
    assert tail(data) == (text[:cut], text[cut:])


def test_copies_of_one_document_are_cut_alike(tmp_path: Path):
    corpus = scan(write_rows(tmp_path / "a.jsonl", ["0123456789"] * 3), progress=False)
    pieces = [(piece.text, piece.val) for piece in corpus.pieces() if not piece.ends]
    assert pieces == [("012345678", False), ("9", True)] * 3
    assert sum(piece.ends for piece in corpus.pieces()) == 6


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare is not on this machine")
def test_tinyshakespeare_is_cut_as_nanogpt_cuts_it():
    train, val = tail(DataConfig(source=str(SHAKESPEARE)))
    assert (len(train), len(val)) == (1_003_854, 111_540)


def test_texts_for_training_leave_out_validation(tmp_path: Path):
    rows = [f"document {number}" for number in range(100)]
    corpus = scan(write_rows(tmp_path / "a.jsonl", rows), progress=False)
    everything = "".join(corpus.texts(train_only=False))
    train = "".join(corpus.texts(train_only=True))
    assert everything == "".join(rows)
    assert train == "".join(piece.text for piece in corpus.pieces() if not piece.val)
    assert len(train) < len(everything)


@pytest.mark.parametrize("content", ["", "\n \n\t"])
def test_no_text_is_refused(content: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match="holds no text"):
        scan(DataConfig(source=str(tmp_path / "a.txt")))


def test_text_that_changes_meanwhile_is_noticed(tmp_path: Path):
    rows = [f"document {number}" for number in range(10)]
    corpus = scan(write_rows(tmp_path / "a.jsonl", rows), progress=False)
    write_rows(tmp_path / "a.jsonl", [*rows, "one more"])
    with pytest.raises(UserError, match="changed while it was read"):
        list(corpus.pieces())


def test_texts_in_files_are_read_twice_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * (number + 5))
    (tmp_path / "blank.md").write_text(" \n")
    opened: list[str] = []
    read_text = sources.read_text
    monkeypatch.setattr(
        sources, "read_text", lambda path, encoding: opened.append(path.name) or read_text(path)
    )
    corpus = scan(DataConfig(source=str(tmp_path)), progress=False)
    pieces = list(corpus.pieces())
    assert sum(piece.ends for piece in pieces) == 6  # each is cut, and both parts end
    # Once for the scan, once for the pieces; the blank one is looked at and left out.
    assert sorted(opened) == sorted(["0.txt", "1.txt", "2.txt", "blank.md"] * 2)


def test_a_blank_file_that_gets_text_meanwhile_is_noticed(tmp_path: Path):
    for name, text in {"a.txt": "one text", "b.txt": " ", "c.txt": "another"}.items():
        (tmp_path / name).write_text(text)
    corpus = scan(DataConfig(source=str(tmp_path)), progress=False)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(UserError, match="changed while it was read"):
        list(corpus.pieces())


def test_memory_does_not_grow_with_the_text(tmp_path: Path):
    def peak(megabytes: int) -> int:
        line = "some words on a line, " * 45 + "\n"
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for _ in range(megabytes):
                file.write(line * 1024)
        tracemalloc.start()
        corpus = scan(DataConfig(source=str(path)), progress=False)
        assert sum(len(piece.text) for piece in corpus.pieces()) == path.stat().st_size
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    small, large = peak(4), peak(16)
    assert large < small + 2**20
    assert large < 12 * 2**20
