"""The names that users' scripts depend on: commands, options, fields, exit codes."""

import io
import json
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from gpt.cli.arguments import RATE_POLICIES, knobs_page
from gpt.config import Config
from gpt.configfile import dump_config, json_schema, knobs, knobs_help, load_config
from gpt.ratepolicy import POLICIES
from tests.conftest import ConfigMaker, tiny_config

ROOT = Path(__file__).parent.parent
COMMANDS = ("gpt-train", "gpt-infer", "gpt-data", "gpt-lr", "gpt-report")
DESK = ("plan", "find", "sweep", "suggest", "scale", "lessons")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(name: str, *arguments: str, text: str = "", cwd: Path = ROOT) -> Ended:
    """Runs a console command's `main` in this process; `text` is its standard input."""
    main = import_module(f"gpt.cli.{name.removeprefix('gpt-')}").main
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    with (
        redirect_stdout(stdout),
        redirect_stderr(io.StringIO()) as stderr,
        patch("sys.stdin", stdin),
        chdir(cwd),
    ):
        try:
            code = main(list(arguments))
        except SystemExit as end:  # argparse's own
            code = int(end.code or 0)
        stdout.flush()
        printed = stdout.buffer.getvalue().decode()
    return Ended(code, printed, stderr.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, trained by the command; tests only read it."""
    folder = tmp_path_factory.mktemp("contract")
    config = folder / "tiny.yaml"
    config.write_text(dump_config(tiny_config(folder)), encoding="utf-8")
    result = command("gpt-train", "--config", str(config))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "stdout is for text that is piped on"
    return folder / "runs" / "tiny"


def test_console_scripts_are_installed() -> None:
    for name in COMMANDS:
        assert (Path(sys.executable).parent / name).exists(), name


@pytest.mark.parametrize(
    "words", [*((name,) for name in COMMANDS), *(("gpt-lr", name) for name in DESK)]
)
def test_help_is_quick_and_imports_no_torch(words: tuple[str, ...]) -> None:
    name, *rest = words
    program = (
        "import sys\n"
        f"from gpt.cli.{name.removeprefix('gpt-')} import main\n"
        f"try:\n    main({[*rest, '--help']})\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'tiktoken', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    took = []
    for _ in range(3):
        before = os.times()
        result = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
        after = os.times()  # of the CPU: other workers may be busy
        took.append(sum(after[2:4]) - sum(before[2:4]))
    assert "usage" in result.stdout
    assert 0 < min(took) < 0.3, took


def test_help_lists_every_knob_with_its_default() -> None:
    shown = command("gpt-train", "--help").stdout
    for name, _, default, _ in knobs():
        assert f"--{name}\n" in shown
        assert default in shown


def test_help_names_every_rate_policy() -> None:
    assert RATE_POLICIES == POLICIES


def test_schema_is_current_and_accepts_the_shipped_configs() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    written = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "say `make schema`"
    assert knobs_page() == knobs_help(), "say `make schema`"
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(shipped) >= 3
    for path in shipped:
        values = load_config(path).model_dump(mode="json")
        jsonschema.validate(values, written)
        assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=")


def test_contract_sections_and_keys_exist() -> None:
    contract = """
    run: {name: quickstart, dir: runs, seed: 1337}
    data: {source: python-stdlib, val_fraction: 0.1}
    tokenizer: {kind: bpe, vocab_size: 4096}
    model: {preset: null, n_layer: 4, n_head: 4, n_embd: 128, context_len: 256, dropout: 0.0}
    optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1}
    schedule: {name: warmup_cosine, warmup_steps: 100, start_factor: 0.1, min_lr: 3.0e-5}
    train: {max_steps: 2000, batch_size: 32, micro_batch_size: null, grad_clip: 1.0, device: auto,
            dtype: auto, compile: auto}
    eval: {every_steps: 250}
    checkpoint: {every_steps: 250, keep: 3}
    log: {every_steps: 10, tensorboard: false, wandb: false}
    """
    config = Config.model_validate(yaml.safe_load(contract))
    assert config.schedule.warmup_steps == 100


def test_a_runs_log_has_the_names_that_scripts_read(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["kind"] == "train" and line["step"] == 3)
    names = "step tokens epoch loss lr grad_norm clipped update_ratio tokens_per_s time_s lrs "
    names += "loss_mean loss_max grad_norm_max clipped_share skipped adam_rms slope_before "
    names += "slope_after noise_scale memory_bytes cpu_share others_share major_faults"
    assert set(train) >= set(names.split())
    evaluation = next(line for line in lines if line["kind"] == "eval")
    assert set(evaluation) >= {"val_loss", "val_bpb", "train_loss", "val_se", "val_tokens"}
    layers = next(line for line in lines if line["kind"] == "layers")
    assert set(layers["rms"]) == set(layers["dead_share"]) == {"blocks.0", "blocks.1"}
    assert set(layers["attn_logit_max"]) == set(layers["rms"])
    assert set(layers["update_ratio"]) == set(layers["grad_norm"]) > {"blocks.0.attn.wq.weight"}
    events = {line["event"]: line for line in lines if line["kind"] == "event"}
    assert set(events) >= {"run", "data_check", "sample", "end"}
    assert set(events["run"]) >= {"total_steps", "vocab_size", "device", "dtype", "threads"}
    assert set(events["data_check"]) >= {"unigram_entropy", "duplicate_share", "leak_share"}


def test_a_run_directory_repeats_the_run(trained: Path) -> None:
    again = command("gpt-train", "--config", str(trained / "config.yaml"), "--run.name", "again")
    assert again.returncode == 0, again.stderr
    step = Path("checkpoints") / "step-00000012" / "model.safetensors"
    assert (trained / step).read_bytes() == (trained.parent / "again" / step).read_bytes()


def test_infer_json_and_seed(trained: Path) -> None:
    arguments = ("--run", str(trained), "--prompt", "the 学", "--max-tokens", "9", "--seed", "3")
    first = command("gpt-infer", *arguments, "--samples", "2", "--json")
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert len(rows) == 2
    assert set(rows[0]) >= {"prompt", "text", "tokens", "finish_reason"}
    assert rows[0]["prompt"] == "the 学"
    assert first.stdout == command("gpt-infer", *arguments, "--samples", "2", "--json").stdout
    piped = command("gpt-infer", "--run", str(trained), "--prompt", "-", text="the cat")
    assert piped.returncode == 0
    assert "the cat" in piped.stdout


def bad_yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


BAD_TRAIN = {
    "typo": ("model: {n_layr: 2}", "did you mean model.n_layer"),
    "missing file": ("data: {source: nothing-here.txt}", "nothing-here.txt"),
    "not divisible": ("model: {n_embd: 10, n_head: 4}", "not divisible"),
    "empty text": ("data: {source: empty.txt}", "empty"),
    "binary text": ("data: {source: binary.txt}", "binary.txt"),
    "short text": ("data: {source: short.txt}\ntokenizer: {kind: bytes}", "context_len"),
    "no CUDA": ("train: {device: 'cuda:99'}", "cuda:99"),
    "bad number": ("optimizer: {lr: fast}", "optimizer.lr"),
    "unknown preset": ("model: {preset: gpt5}", "gpt2-124m"),
    "warmup too long": ("schedule: {warmup_steps: 3000}", "3000"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_input_is_one_line_and_exit_2(case: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "short.txt").write_text("too short for a context")
    text, named = BAD_TRAIN[case]
    before = sorted(tmp_path.iterdir())
    config = bad_yaml(tmp_path, text)
    result = command("gpt-train", "--config", config, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert named in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("step-*"))
    assert [path for path in before if not path.exists()] == []


def test_no_config_at_all() -> None:
    assert command("gpt-train").returncode == 2
    missing = command("gpt-train", "--config", "configs/quikstart.yaml", cwd=ROOT)
    assert missing.returncode == 2
    assert "did you mean configs/quickstart.yaml?" in missing.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--max-tokens", "0"),
        ("--top-k", "0"),
        ("--samples", "0"),
        ("--device", "cuda:99"),
        ("--run", "nowhere"),
        ("--checkpoint", "nowhere"),
    ],
)
def test_bad_options_of_infer(arguments: tuple[str, ...], trained: Path) -> None:
    result = command("gpt-infer", "--run", str(trained), "--prompt", "a", *arguments)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_infer_without_a_run(tmp_path: Path) -> None:
    result = command("gpt-infer", "--prompt", "a", cwd=tmp_path)
    assert result.returncode == 2
    assert "no run" in result.stderr


def test_dry_run_touches_nothing(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(make_config()), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    result = command("gpt-train", "--config", str(config), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "words", [["--no-such-option", "x"], ["--config"], ["nonsense", "nonsense"]]
)
def test_mistakes_of_the_command_line_are_lines_too(name: str, words: list[str]) -> None:
    ended = command(name, *words)
    assert ended.returncode == 2
    assert ended.stdout == ""
    for line in ended.stderr.splitlines():
        assert line.startswith("error: "), line
