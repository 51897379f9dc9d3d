"""The command's output, exit codes and speed of `--help`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt import data as data_module
from gpt.cli.data import main


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [
        {"body": f"document {number}: 你好 🙂 the cat sat on the mat. " * 3} for number in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"data: {{source: {tmp_path / 'rows.jsonl'}, text_field: body, dir: {tmp_path / 'data'}}}\n"
        "tokenizer: {kind: bpe, vocab_size: 300}\n"
        "model: {context_len: 32}\n"
    )
    return path


def test_build_then_info(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["build", "--config", str(config)]) == 0
    folder = capsys.readouterr().out.strip()
    assert main(["info", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["train"]["documents"] + facts["val"]["documents"] == 40
    assert facts["tokenizer"]["vocab_size"] == 300
    for side in ("train", "val"):
        row = facts[side]
        assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"])
        assert row["peek"].startswith("document ")
    assert main(["info", folder]) == 0
    table = capsys.readouterr().out
    assert f"{facts['train']['tokens']:,}" in table
    assert "bytes/token" in table
    assert "你好 🙂" in table


def test_overrides(config: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--tokenizer.kind", "bytes", "--data.val_fraction=0.5"]
    assert main(["build", "--config", str(config), *words]) == 0
    assert main(["info", capsys.readouterr().out.strip(), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokenizer"]["kind"] == "bytes"
    assert facts["val"]["documents"] == 20


def test_tokenizer(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made"
    assert main(["tokenizer", "--config", str(config), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "300 ids" in shown.out
    ranks = out / "tokenizer.tiktoken"
    assert str(ranks) in shown.err
    # The saved ranks, used as a kind, have the ids of the kind that made them.
    ids = []
    for kind in ("bpe", str(ranks)):
        assert main(["build", "--config", str(config), "--tokenizer.kind", kind]) == 0
        folder = Path(capsys.readouterr().out.strip())
        ids.append((folder / "train-00000.bin").read_bytes()[128:])
    assert ids[0] == ids[1]


def test_another_tokenizer_is_not_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "made"
    words = ["tokenizer", "--config", str(config), "--out", str(out)]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(words) == 0  # the same once more
    capsys.readouterr()
    for size in ("290", "310"):
        assert main([*words, "--tokenizer.vocab_size", size]) == 2
        assert f"--out: {out} holds another tokenizer" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "tokenizer.json").write_text('{"version": "1.0"}')  # of another program
    assert main(words) == 2


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("closed/made", "closed forbids it; give another"),
        ("c.yaml/made", "c.yaml forbids it; give another"),
        ("n" * 300, "cannot be written: File name too long; name another folder"),
    ],
)
def test_where_to_save_is_checked_before_the_work(
    out: str,
    message: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    closed = config.parent / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != closed)  # root may do all
    monkeypatch.setattr(data_module, "make_tokenizer", None)
    where = str(config.parent / out)
    assert main(["tokenizer", "--config", str(config), "--out", where]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"error: --out: {where} cannot be written")
    assert told[0].endswith(message)


@pytest.mark.parametrize("split", ["auto", "cl100k_base"])
def test_the_keys_that_tokenizer_names_give_its_ids(
    split: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"body": f"numbers {n * 7919 % 100_000}, I'LL\n\nmend"} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--config", str(config), "--tokenizer.split", split]
    assert main(["tokenizer", *words, "--out", str(tmp_path / "made")]) == 0
    told = capsys.readouterr().err.partition("exactly these ids: ")[2].strip()
    keys = [f"--{key.replace(': ', '=')}" for key in told.split(", ")]
    assert [key.partition("=")[0] for key in keys] == ["--tokenizer.kind", "--tokenizer.split"]
    shards = []
    for given in (words, ["--config", str(config), *keys]):
        assert main(["build", *given]) == 0
        folder = Path(capsys.readouterr().out.strip())
        shards.append((folder / "train-00000.bin").read_bytes()[128:])
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "{tmp}/nowhere"], "not a data folder"),
        (["info", "{tmp}/data"], "not a data folder"),
        (["info", "n" * 300], "n: cannot be read: File name too long; check the path"),
        (["info", "{tmp}", "--data.dir", "x"], "reads no config"),
        (["build", "--config", "{tmp}/nope.yaml"], "does not exist"),
        (["build", "--config", "{tmp}/c.yaml", "--data.source", "{tmp}/x.txt"], "does not exist"),
        (["build", "--config", "{tmp}/c.yaml", "--data.text_field", "text"], "no field 'text'"),
        (
            ["build", "--config", "{tmp}/c.yaml", "--model.context_len", "99999"],
            "context_len 99999",
        ),
        (["tokenizer", "--config", "{tmp}/c.yaml", "--out", "{tmp}/c.yaml"], "is a file"),
        (
            ["tokenizer", "--config", "{tmp}/c.yaml", "--tokenizer.kind", "bpee"],
            "did you mean bpe?",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([word.replace("{tmp}", str(config.parent)) for word in words]) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert shown.out == ""


def test_damage_is_refused_by_info(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["build", "--config", str(config)]) == 0
    folder = Path(capsys.readouterr().out.strip())
    shard = folder / "val-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["info", str(folder)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert shard.read_bytes() == content  # info repairs nothing


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys\nfrom gpt.cli.data import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'tiktoken', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout
    assert time.perf_counter() - start < 5  # 0.4 s alone; machines under test are busy
