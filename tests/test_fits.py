"""What fits into memory: the bounds against the rehearsal, the advice taken, failures explained."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt.build import dry_run
from gpt.config import Config
from gpt.configfile import load_config
from gpt.errors import UserError
from gpt.fits import (
    Room,
    batch_bytes,
    bounds,
    check_fits,
    fitting,
    is_out_of_memory,
    memory_errors,
    memory_for_inference,
)
from gpt.lr.memory import estimate_memory
from gpt.room import room
from tests.conftest import ConfigMaker
from tests.torture.runs import write_config

CPU, VOCAB = torch.device("cpu"), 300
ROOT = Path(__file__).parent.parent
LLAMA = {"model.activation": "swiglu", "model.qk_norm": "false", "model.dropout": "0.1"}
GPT2 = {"model.position": "learned", "model.norm": "layernorm", "model.activation": "gelu"}
GPT2 |= {"model.bias": "true", "model.qk_norm": "false", "model.tie_embeddings": "true"}


def rehearsed(config: Config, vocab_size: int, dtype: torch.dtype) -> float:
    return batch_bytes(config) + estimate_memory(config, vocab_size, dtype).total


def sized(**changes: str) -> Config:
    base = {"train.batch_size": "8", "model.n_embd": "64", "model.context_len": "64"}
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, list((base | given).items()))


def have(monkeypatch: pytest.MonkeyPatch, free: float, swap: float = 0) -> None:
    monkeypatch.setattr("gpt.fits.room", lambda device: Room(free, swap))


@pytest.mark.parametrize(
    ("more", "dtype"),
    [({}, torch.float32), (LLAMA, torch.float32), (GPT2, torch.bfloat16)],
    ids=["ours", "llama", "gpt2"],
)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"model.n_layer": "12"},
        {"model.n_embd": "256"},
        {"model.context_len": "512"},
        {"train.micro_batch_size": "1"},
        {"train.activation_checkpointing": "true"},
        {"train.batch_size": "1", "model.context_len": "2"},
        {"optimizer.name": "muon"},
        {"optimizer.name": "sgd", "optimizer.momentum": "0"},
        {"optimizer.name": "adafactor"},
    ],
)
def test_the_rehearsal_lies_within_the_bounds(more, dtype, shape):
    config = load_config(None, list((SMALL | more | shape).items()))
    for vocab_size in (257, 8000):
        at = bounds(config, vocab_size)
        assert at.resting <= at.low <= rehearsed(config, vocab_size, dtype) <= at.high


SMALL = {"train.batch_size": "8", "model.n_embd": "64", "model.context_len": "64"}


def test_a_small_run_costs_no_rehearsal(monkeypatch):
    have(monkeypatch, 8e9)
    monkeypatch.setattr("gpt.fits.estimate_memory", lambda *_: pytest.fail("rehearsed"))
    config = load_config(None)  # the quickstart's shape
    start = time.process_time()
    assert check_fits(config, 4096, CPU, torch.float32, compiles=False) == []
    assert time.process_time() - start < 0.05


def refused(config: Config, **more: bool) -> str:
    with pytest.raises(UserError) as caught:
        check_fits(config, VOCAB, CPU, torch.float32, **({"compiles": False} | more))
    (line,) = caught.value.lines
    return line


def test_the_largest_micro_batch_that_fits_is_named(monkeypatch):
    """It fits, and the next power of two does not."""
    config = sized(train__batch_size="256")
    have(monkeypatch, rehearsed(config, VOCAB, torch.float32) * 0.4)
    line = refused(config)
    assert line.startswith("train.batch_size 256: a step needs")
    size = int(re.search(r"it would fit with --train.micro_batch_size (\d+)$", line)[1])
    better = sized(train__batch_size="256", train__micro_batch_size=str(size))
    assert check_fits(better, VOCAB, CPU, torch.float32, compiles=False) == []
    refused(sized(train__batch_size="256", train__micro_batch_size=str(2 * size)))


@pytest.mark.parametrize(
    ("changes", "free", "key"),
    [
        ({"model__context_len": "65536", "train__batch_size": "1"}, 1e9, "model.context_len"),
        ({"model__n_layer": "500", "train__batch_size": "2"}, 2e8, "model.n_layer"),
        ({"model__n_embd": "8192", "model__n_layer": "2"}, 2e9, "model.n_embd"),
        ({"model__n_embd": "65536", "model__n_layer": "1000"}, 16e9, "model"),
        (
            {"train__batch_size": "10000000", "train__micro_batch_size": "1"},
            1e9,
            "train.batch_size",
        ),
        (
            {"train__batch_size": "10000000", "model__context_len": "1048576"},
            1e9,
            "train.batch_size",
        ),
    ],
)
def test_else_smaller_sizes_are_named_and_fit(monkeypatch, changes, free, key):
    have(monkeypatch, free)
    start = time.process_time()
    line = refused(sized(**changes))
    assert time.process_time() - start < 5
    assert line.startswith(key)
    advised = re.findall(r"--(\S+) (\d+)", line)
    assert advised
    base = {name.replace("__", "."): value for name, value in changes.items()}
    smaller = load_config(None, list((SMALL | base | dict(advised)).items()))
    assert check_fits(smaller, VOCAB, CPU, torch.float32, compiles=False) == []


def test_near_the_limit_is_a_warning_and_swap_counts_as_room(monkeypatch):
    config = sized(train__batch_size="64")
    need = rehearsed(config, VOCAB, torch.float32)
    have(monkeypatch, need * 1.1)
    (line,) = check_fits(config, VOCAB, CPU, torch.float32, compiles=False)
    assert line.startswith("warning: a step needs about")
    assert "--train.micro_batch_size" in line
    have(monkeypatch, need * 0.9, swap=need)
    assert check_fits(config, VOCAB, CPU, torch.float32, compiles=False)
    have(monkeypatch, need * 0.9)
    refused(config)
    assert check_fits(config, VOCAB, CPU, torch.float32, compiles=True), "it may hold less"
    have(monkeypatch, 1e5)
    assert "alone need" in refused(config, compiles=True)
    assert fitting(config, VOCAB, 1e4) == {}


def test_the_dry_run_and_the_run_refuse_alike(make_config: ConfigMaker, monkeypatch):
    from gpt.train import train

    have(monkeypatch, 1e5)
    config = make_config()
    with pytest.raises(UserError) as first:
        dry_run(config, "auto")
    with pytest.raises(UserError) as second:
        train(config)
    assert first.value.lines == second.value.lines
    assert not Path(config.run.dir, config.run.name).exists()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_limits_of_the_process_are_seen():
    code = (
        "import resource, torch, gpt.room as r\n"
        "from pathlib import Path\n"
        "before = r.room(torch.device('cpu'))\n"
        "used = int(r._numbers(Path('/proc/self/status'))['VmData'])\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 10**8,) * 2)\n"
        "print(before.free > 10**8 >= r.room(torch.device('cpu')).free > 0)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "True\n", found.stderr
    assert room(CPU).free > 0


LIMITED = """
import resource, sys
from pathlib import Path
from gpt.cli.train import main
import gpt.build, gpt.train, gpt.ending, gpt.fits, gpt.room
gpt.ending.plot_run = gpt.ending.write_report = lambda *_: None
gpt.fits.room = lambda device: None  # as where the system tells nothing: the step itself must fail
used = int(gpt.room._numbers(Path("/proc/self/status"))["VmData"])
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_a_failed_allocation_is_a_line_with_a_command_that_works(make_config: ConfigMaker):
    sizes = {"model__context_len": "128", "model__n_embd": "128", "train__max_steps": "2"}
    config = make_config(**sizes, train__batch_size="256", eval__sample_tokens="0")
    half = config.train.model_copy(update={"micro_batch_size": 128})
    smaller = config.model_copy(update={"train": half})
    limit = int(1.7 * rehearsed(smaller, 257, torch.float32))
    assert limit < rehearsed(config, 257, torch.float32)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    ended = command("--config", str(write_config(config, Path(config.run.dir).parent)))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "train.batch_size 256: an allocation failed" in line
    assert "there is no checkpoint yet" in line
    advised = line.partition("Go on with: gpt-train ")[2].split()
    assert advised[-2:] == ["--train.micro_batch_size", "128"]
    further = command(*advised[:-1], "16")  # as the advice would come to, three times on
    assert further.returncode == 0, further.stderr


def test_what_an_allocation_that_failed_says(make_config: ConfigMaker, tmp_path: Path):
    failed = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(12, "no memory")]
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60)
    assert all(map(is_out_of_memory, [*failed, torchs.value]))
    assert not any(map(is_out_of_memory, [ValueError(), RuntimeError("shape"), OSError(28, "")]))
    with pytest.raises(RuntimeError, match="shape"), memory_errors(make_config(), tmp_path):
        raise RuntimeError("shape")
    one = {"train__micro_batch_size": "1"}
    with pytest.raises(UserError, match=r"--train.activation_checkpointing true$"):  # noqa: SIM117
        with memory_errors(make_config(**one), tmp_path):
            raise MemoryError
    one["train__activation_checkpointing"] = "true"
    with pytest.raises(UserError, match=r"--model.context_len 8 --run.name tiny-short"):  # noqa: SIM117
        with memory_errors(make_config(**one), tmp_path):
            raise MemoryError


def test_inference_names_the_weights_that_do_not_fit(tmp_path: Path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 5000)
    have(monkeypatch, 4000)
    with (
        pytest.raises(UserError, match="its weights take 0 MB"),
        memory_for_inference(tmp_path, CPU),
    ):
        pytest.fail("entered")
    have(monkeypatch, 1e9)
    with pytest.raises(UserError, match="fewer --samples"), memory_for_inference(tmp_path, CPU):
        torch.empty(2**60)
