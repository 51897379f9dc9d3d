"""`gpt-infer` as users meet it: streams, JSON, batches, the interactive mode, every mistake."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt.infer
from gpt.checkpoint import Training, save_checkpoint
from gpt.cli.infer import main
from gpt.config import Config, TokenizerConfig
from gpt.generate import Piece, Sampling, complete
from gpt.model import GPT
from gpt.tokenizer import build_tokenizer

CONFIG = Config.model_validate(
    {
        "tokenizer": {"kind": "bytes"},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_len": 32, "init": "gpt2"},
    }
)
BYTES = build_tokenizer(TokenizerConfig(kind="bytes"), lambda: iter(()))


def build_model() -> GPT:
    torch.manual_seed(41)
    model = GPT(CONFIG.model, BYTES.vocab_size).eval()
    with torch.no_grad():
        model.head.weight[128:] = -1  # letters and such only
        model.head.weight[:32] = -1
    return model


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one checkpoint, the newest under runs/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    training = Training(CONFIG, BYTES, model, optimizer, scheduler, scaler, torch.float32, "")
    training.progress.step = 1
    folder = tmp_path / "runs" / "tiny"
    save_checkpoint(folder / "checkpoints" / "step-00000001", training)
    return folder


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def expected(prompt: str, **options: Any) -> str:
    (result,) = complete(build_model(), BYTES, [prompt], Sampling(**options))
    return result.text


def test_prompt_is_echoed_and_continued(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt", "Once", "--max-tokens", "9", "--seed", "3", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "Once" + expected("Once", max_tokens=9, seed=3) + "\n"
    assert "9 tokens in" in err
    assert "tokens/s" in err


def test_checkpoint_run_and_newest_are_the_same(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--prompt", "a", "--temperature", "0", "--max-tokens", "5"]
    outs = []
    checkpoint = str(run / "checkpoints" / "step-00000001")
    for which in ([], ["--run", str(run)], ["--checkpoint", checkpoint]):
        assert main([*command, *which]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] == outs[2] == "a" + expected("a", temperature=0, max_tokens=5) + "\n"


def test_json_has_one_object_a_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--samples", "2", "--json", "--seed", "4", "--max-tokens", "6"]
    assert main(["--prompt", "日本", *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert list(row) == ["prompt", "text", "tokens", "finish_reason"]
        assert row["prompt"] == "日本"
        assert row["finish_reason"] == "length"
        assert BYTES.decode(row["tokens"]) == row["text"]
    assert rows[0] != rows[1]


def test_several_rows_are_kept_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbfone\r\nand two\n")  # Windows' editors begin so
    options = ["--samples", "2", "--seed", "5", "--max-tokens", "4"]
    assert main(["--prompts", "prompts.txt", *options]) == 0
    sampling = Sampling(seed=5, max_tokens=4)
    wanted = ""
    for number, prompt in enumerate(["one", "and two"]):
        for sample, row in enumerate(complete(build_model(), BYTES, [prompt], sampling, 2)):
            wanted += f"--- prompt {number + 1}/2, sample {sample + 1}/2 ---\n{prompt}{row.text}\n"
    assert capsys.readouterr().out == wanted


def test_rows_stream_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    done = complete(build_model(), BYTES, ["a", "b"], Sampling(seed=1, max_tokens=1))
    request = gpt.infer.Request(["a", "b"], Sampling())
    pieces = [
        (Piece(1, 0, "B1", None), "--- prompt 1/2 ---"),
        (Piece(0, 0, "A1", None), "--- prompt 1/2 ---\naA1"),
        (Piece(1, 0, "B2", done[1]), "--- prompt 1/2 ---\naA1"),
        (Piece(0, 0, "A2", done[0]), "--- prompt 1/2 ---\naA1A2\n--- prompt 2/2 ---\nbB1B2\n"),
    ]
    out = ""
    shown = gpt.infer.show((piece for piece, _ in pieces), ["a", "b"], request)
    for number, _ in enumerate(shown):
        out += capsys.readouterr().out
        assert out == (pieces[number][1] if number else "")


def test_stdin_is_read_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"two\nlines\xff\n")
    assert main(["--prompt", "-", "--max-tokens", "1", "--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "two\nlines\ufffd"


def test_interactive_mode(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"one\ntwo\n:q\nthree\n")
    options = ["--interactive", "--max-tokens", "5", "--temperature", "0"]
    assert main(options) == 0
    greedy = {"max_tokens": 5, "temperature": 0}
    wanted = f"one{expected('one', **greedy)}\ntwo{expected('two', **greedy)}\n"
    assert capsys.readouterr().out == wanted
    stdin(monkeypatch, b"one\n")
    assert main(options) == 0, "the end of the input ends it"


def test_bytes_that_are_no_text_end_no_session(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"a\xff\xed\nb\n")
    assert main(["--interactive", "--max-tokens", "2", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a\ufffd")
    assert "\nb" in out
    assert err == ""


def test_a_terminal_is_controlled_by_no_text(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--prompt", "\x1b]0;owned\x07\n\tb", "--max-tokens", "1", "--seed", "1"]
    assert main(command) == 0
    assert "\x1b]0;owned\x07\n\tb" in capsys.readouterr().out  # a pipe gets what there is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(command) == 0
    assert "\ufffd]0;owned\ufffd\n\tb" in capsys.readouterr().out


def test_no_stdin_at_all(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["--prompt", "-"]) == 2
    assert capsys.readouterr().err.startswith("error: --prompt -: stdin is closed")
    assert main(["--interactive"]) == 2
    assert "no terminal" in capsys.readouterr().err


def test_interrupt_stops_a_text_and_the_session_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = gpt.infer.generate, []

    def interrupted_once(*given: Any) -> Any:
        calls.append(given)
        for piece in real(*given):
            yield piece
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(gpt.infer, "generate", interrupted_once)
    stdin(monkeypatch, b"one\ntwo\n")
    assert main(["--interactive", "--max-tokens", "5", "--temperature", "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert out[0] == "one" + expected("one", max_tokens=1, temperature=0)
    assert out[1] == "two" + expected("two", max_tokens=5, temperature=0)


def test_ctrl_c_outside_of_the_interactive_mode_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt.infer, "generate", interrupted)
    assert main(["--prompt", "a"]) == 130


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "warm"], "invalid float value: 'warm'"),
        (["--top-k", "0"], "top-k 0"),
        (["--top-p", "0"], "top-p 0"),
        (["--top-p", "1.5"], "top-p 1.5"),
        (["--min-p", "2"], "min-p 2"),
        (["--max-tokens", "0"], "max-tokens 0"),
        (["--repetition-penalty", "-2"], "repetition-penalty -2"),
        (["--samples", "0"], "samples 0"),
        (["--stop", ""], "stop ''"),
        (["--stop", "---"], "one that begins with - is written --stop=VALUE"),
        (["--run", "absent"], "absent"),
        (["--run", "empty"], "empty"),
        (["--checkpoint", "empty"], "empty"),
        (["--device", "toaster"], "error: --device: 'toaster' is not auto"),
        (["--dtype", "fp8"], "fp8"),
        (["--prompts", "absent.txt"], "not allowed with"),
        (["--quantise"], "--quantise"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    Path("empty").mkdir()
    assert main(["--prompt", "a", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


def test_no_prompt_no_file_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stdin(monkeypatch, b"")
    Path("empty.txt").touch()
    for arguments, word in (
        ([], "--prompt TEXT"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--prompts", "empty.txt"], "empty.txt is empty"),
        (["--prompts", "."], "cannot be read"),
        (["--prompt", "a"], "no run"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert word in err


@pytest.mark.parametrize("prompt", ["", "\udce6\udcff", "a" * 5000, "<|endoftext|>", "\x00"])
def test_odd_prompts_work(run: Path, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    assert main(["--prompt", prompt, "--max-tokens", "3", "--seed", "1", "--top-k", "99999"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(prompt.encode("utf-8", "replace").decode().replace("??", "\ufffd\ufffd"))
    assert ("the model sees 32" in err) == (len(prompt) > 32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(run: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    arguments = ["--prompt", "a", "--dtype", dtype, "--max-tokens", "3", "--json"]
    arguments += ["--seed", "1"]  # else the end of the text may come first
    assert main(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 3


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from gpt.cli.infer import main\ntry: main(['--help'])\n"
    code += "except SystemExit: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 2, "0.5 s on an idle machine"
    assert "--repetition-penalty" in result.stdout
