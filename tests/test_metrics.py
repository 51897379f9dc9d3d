"""metrics.jsonl, what survives, what is read back; the console; the trackers."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import Config
from gpt.errors import UserError
from gpt.metrics import (
    METRICS_NAME,
    Console,
    MetricsLog,
    duration,
    progress_text,
    read_metrics,
    truncate_after,
)


def write(run: Path, *records: dict[str, object]) -> bytes:
    with MetricsLog(run) as log:
        for record in records:
            log.write(record)
    return (run / METRICS_NAME).read_bytes()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_one_valid_json_object_a_line(tmp_path):
    content = write(
        tmp_path,
        {"kind": "train", "step": 1, "loss": math.nan, "lr": 1e-4, "clipped": False},
        {
            "kind": "event",
            "step": 1,
            "name": "x",
            "text": "zwei\nZeilen\r, é",
            "values": [math.inf],
        },
        {"kind": "eval", "step": 1, "val_loss": -math.inf, "val_bpb": None},
    )
    lines = content.decode().splitlines()
    assert len(lines) == 3
    parsed = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    assert parsed[0]["loss"] == "NaN"
    assert parsed[1]["values"] == ["Infinity"]
    assert parsed[2]["val_loss"] == "-Infinity"
    read = read_metrics(tmp_path)
    assert math.isnan(read[0].pop("loss"))
    assert read[0] == {"kind": "train", "step": 1, "lr": 1e-4, "clipped": False}
    assert read[1]["values"] == [math.inf]
    assert read[1]["text"] == "zwei\nZeilen\r, é"
    assert read[2]["val_loss"] == -math.inf


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
    )
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_whatever_is_written_is_read_back(tmp_path_factory, record):
    run = tmp_path_factory.mktemp("run")
    write(run, record)
    assert read_metrics(run) == [record]


def test_a_line_survives_kill_9(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from gpt.metrics import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}))
for step in range(1, 6):
    log.write({{"kind": "train", "step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_without_metrics_has_no_records(tmp_path):
    assert read_metrics(tmp_path) == []
    truncate_after(tmp_path, 5)
    assert not (tmp_path / METRICS_NAME).exists()


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b'{"step": 1}', b"\xff\xfe", b"[1]\n"])
def test_torn_lines_are_left_out(tmp_path, torn):
    write(tmp_path, {"step": 1}, {"step": 2})
    with (tmp_path / METRICS_NAME).open("ab") as file:
        file.write(torn)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    truncate_after(tmp_path, 2)
    write(tmp_path, {"step": 3})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_truncate_cuts_what_came_after_the_checkpoint(tmp_path):
    records = [
        {"kind": "event", "step": 0},
        {"kind": "train", "step": 10},
        {"kind": "eval", "step": 10},
        {"kind": "train", "step": 20},
        {"kind": "event", "step": 25},
    ]
    write(tmp_path, *records)
    truncate_after(tmp_path, 10)
    assert read_metrics(tmp_path) == records[:3]
    truncate_after(tmp_path, -1)
    assert read_metrics(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_NAME]


def test_truncate_leaves_the_old_file_when_it_cannot_finish(tmp_path, monkeypatch):
    before = write(tmp_path, {"step": 1}, {"step": 2})

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        truncate_after(tmp_path, 1)
    assert (tmp_path / METRICS_NAME).read_bytes() == before


def test_truncate_does_not_rewrite_for_nothing(tmp_path):
    write(tmp_path, {"step": 1})
    before = (tmp_path / METRICS_NAME).stat()
    truncate_after(tmp_path, 1)
    assert (tmp_path / METRICS_NAME).stat().st_ino == before.st_ino


def test_tensorboard_gets_the_numbers(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write({"kind": "train", "step": 10, "loss": 2.5, "clipped": True, "note": "x"})
        log.write({"kind": "eval", "step": 20, "val_loss": 3.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/clipped", "eval/val_loss"}
    (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (10, 2.5)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, tracker):
    name = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[tracker]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"log\.{tracker}.*gpt-train\[track\]"):
        MetricsLog(tmp_path, **{tracker: True})


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    logged: list[dict[str, float]] = []
    calls: dict[str, object] = {}

    def init(**options):
        calls.update(options)
        return types.SimpleNamespace(log=logged.append, finish=lambda: calls.update(done=True))

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config.model_validate({"run": {"name": "mine"}})
    with MetricsLog(tmp_path, wandb=True, config=config) as log:
        log.write({"kind": "train", "step": 3, "loss": 1.5})
        log.write({"kind": "event", "step": 3, "text": "nothing to draw"})
    assert logged == [{"train/loss": 1.5, "step": 3}]
    assert calls["name"] == "mine"
    assert calls["config"] == config.model_dump(mode="json")
    assert calls["done"]


RECORD = {
    "kind": "train",
    "step": 250,
    "loss": 2.34561,
    "lr": 3e-4,
    "grad_norm": 0.851,
    "tokens_per_s": 12345.4,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_in_a_log():
    stream = io.StringIO()
    with Console(2000, stream=stream) as console:
        console.step(RECORD, left_s=100)
        console.step(RECORD | {"step": 251}, log=False)
        console.line("saved")
    assert stream.getvalue() == (
        "step 250/2000  loss 2.3456  lr 3.00e-04  grad 0.85  12,345 tok/s  1m40s left\nsaved\n"
    )


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Console(2000, start_step=249, stream=stream) as console:
        console.step(RECORD, log=False, left_s=100)
        console._bar.refresh()
        console.line("a line of its own")
    shown = stream.getvalue()
    assert "250/2000" in shown
    assert "loss 2.3456  lr 3.00e-04  grad 0.85  12,345 tok/s  1m40s left" in shown
    assert any(
        part.strip() == "a line of its own" for part in shown.replace("\r", "\n").split("\n")
    )


def test_the_console_writes_to_stderr(capsys):
    with Console(10) as console:
        console.line("hello")
    captured = capsys.readouterr()
    assert captured.err == "hello\n"
    assert captured.out == ""


def test_progress_shows_what_is_known_and_numbers_gone_wrong():
    assert progress_text({"step": 1}) == ""
    assert progress_text({"loss": math.nan, "grad_norm": None}) == "loss nan"
    assert progress_text({"loss": 1.0}, left_s=math.inf) == "loss 1.0000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.6, "1m00s"),
        (100, "1m40s"),
        (3600, "1h00m"),
        (11100, "3h05m"),
        (187_200, "2d04h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
