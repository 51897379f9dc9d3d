"""metrics.jsonl, what survives, what is read back; the console; the trackers."""

import errno
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


def test_events_of_batches_that_come_again_are_dropped(tmp_path: Path) -> None:
    """They were passed over after the save, at its step."""
    records = [
        {"kind": "event", "event": "nonfinite", "step": 2, "batch": 2},
        {"kind": "train", "step": 3, "batch": 99},
        {"kind": "event", "event": "resumed", "step": 3},
        {"kind": "event", "event": "nonfinite", "step": 3, "batch": 4},
        {"kind": "event", "event": "nonfinite", "step": 3, "batch": "x"},
    ]
    with MetricsLog(tmp_path) as log:
        for record in records:
            log.write(record)
    truncate_after(tmp_path, 3, 5)
    assert read_metrics(tmp_path) == records
    truncate_after(tmp_path, 3, 4)
    assert read_metrics(tmp_path) == [*records[:3], records[4]]


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


LINES = [
    {"kind": "event", "event": "run", "step": 0, "vocab_size": 257, "device": "cpu"},
    {"kind": "train", "step": 10, "loss": 2.5, "clipped": True, "note": "x", "gone": None}
    | {"lrs": {"matrices": 0.5, "rest": 0.25}},
    {"kind": "layers", "step": 10, "update_ratio": {"blocks.0.attn.wq.weight": 0.125}},
    {"kind": "eval", "step": 20, "val_loss": 3.0},
    {"kind": "event", "event": "finding", "step": 20, "id": "spike", "state": "begin"}
    | {"evidence": "loss 9 at step 18", "cause": "a rate too high", "next": "gpt-lr find"},
    {"kind": "event", "event": "finding", "step": 30, "id": "spike", "state": "end"},
    {"kind": "event", "event": "sample", "step": 30, "prompt": "a", "text": "b\nc \ud800"},
]
DRAWN = {
    "train/loss": 2.5,
    "train/clipped": 1.0,
    "train/lr/matrices": 0.5,
    "train/lr/rest": 0.25,
    "layers/update_ratio/blocks.0.attn.wq.weight": 0.125,
    "eval/val_loss": 3.0,
}


def test_tensorboard_gets_the_numbers_and_the_words(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    with MetricsLog(tmp_path, tensorboard=True) as log:
        for line in LINES:
            log.write(line)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
    assert {tag: scalar.value for tag, scalar in scalars.items()} == DRAWN
    assert scalars["train/loss"].step == 10

    def words(tag: str) -> list[tuple[int, str]]:
        found = events.Tensors(f"{tag}/text_summary")
        return [(each.step, each.tensor_proto.string_val[0].decode()) for each in found]

    assert words("event/run") == [(0, "vocab_size: 257  \ndevice: cpu")]
    assert words("finding/spike") == [
        (20, "loss 9 at step 18; a rate too high\n\n    gpt-lr find"),
        (30, "no longer so"),
    ]
    assert words("sample") == [(30, "    ab\n    c ?")]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    for begin, loss in ((1, 3.0), (4, 2.0)):
        truncate_after(tmp_path, begin - 1)
        with MetricsLog(tmp_path, tensorboard=True) as log:
            for step in range(begin, begin + 6):
                log.write({"kind": "train", "step": step, "loss": loss})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    drawn = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert drawn == [(1, 3), (2, 3), (3, 3), *((step, 2) for step in range(4, 10))]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, tracker):
    name = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[tracker]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"log\.{tracker}.*gpt-train\[track\]"):
        MetricsLog(tmp_path, **{tracker: True})


class FakeWandb(types.ModuleType):
    """W&B's functions that are used, writing down what they are given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []
        self.config = types.SimpleNamespace(update=self._noting("config.update"))

    def _noting(self, name):
        def call(*values, **options):
            self.calls.append((name, values, options))
            return self

        return call

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._noting(name)

    def options(self, name: str) -> list[dict[str, object]]:
        return [options for called, _, options in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_gets_the_numbers_and_the_findings(tmp_path, wandb):
    config = Config.model_validate({"run": {"name": "mine"}})
    with MetricsLog(tmp_path, wandb=True, config=config) as log:
        for line in LINES:
            log.write(line)
    (begun,) = wandb.options("init")
    assert (begun["name"], begun["project"]) == ("mine", "gpt-train")
    assert begun["config"] == config.model_dump(mode="json")
    rows = [values[0] for name, values, _ in wandb.calls if name == "log"]
    assert [row.pop("step") for row in rows] == [10, 10, 20]
    assert rows[0] | rows[1] | rows[2] == DRAWN
    (alert,) = wandb.options("alert")
    assert alert["title"] == "finding/spike"
    assert alert["text"].startswith("loss 9 at step 18; a rate too high")
    assert [values for name, values, _ in wandb.calls if name == "config.update"] == [
        ({"start": {"vocab_size": 257, "device": "cpu"}},)
    ]
    assert wandb.options("define_metric") == [{"step_metric": "step"}]
    assert wandb.options("finish") == [{"exit_code": 0}]


def test_a_run_that_goes_on_is_the_same_one_at_wandb(tmp_path, wandb):
    for _ in range(2):
        with MetricsLog(tmp_path, wandb=True) as log:
            log.write({"kind": "train", "step": 1, "loss": 1.0})
    first, second = wandb.options("init")
    assert (first["id"], first["resume"]) == (second["id"], second["resume"])
    assert (len(first["id"]), first["resume"]) == (8, "allow")
    (tmp_path / METRICS_NAME).unlink()  # begun anew
    with MetricsLog(tmp_path, wandb=True):
        pass
    assert wandb.options("init")[2]["id"] != first["id"]


def test_wandb_offline_keeps_the_parts_of_a_run_apart_in_a_group(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        with MetricsLog(tmp_path, wandb=True) as log:
            log.write({"kind": "train", "step": 1, "loss": 1.0})
    first, second = wandb.options("init")
    assert first["group"] == second["group"]
    assert "id" not in first
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    with MetricsLog(tmp_path, wandb=True):
        pass
    assert "group" not in wandb.options("init")[2]


def test_wandb_hears_that_a_run_failed(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), MetricsLog(tmp_path, wandb=True):
        raise ZeroDivisionError
    assert wandb.options("finish") == [{"exit_code": 1}]


def test_wandb_that_does_not_start(tmp_path, wandb):
    def init(**options):
        raise RuntimeError("No API key\nconfigured.")

    wandb.init = init
    with pytest.raises(UserError, match=r"did not start \(No API key configured\.\).*WANDB_MODE"):
        MetricsLog(tmp_path, wandb=True)


def test_a_folder_called_wandb_is_not_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match="wandb is not installed"):
        MetricsLog(tmp_path, wandb=True)


def test_a_tracker_that_fails_ends_no_run(tmp_path, wandb, capsys):
    def log_row(row):
        raise ConnectionResetError("Connection lost")

    wandb.log = log_row
    with MetricsLog(tmp_path, wandb=True) as log:
        for step in (1, 2):
            log.write({"kind": "train", "step": step, "loss": 1.0})
    assert len(read_metrics(tmp_path)) == 2
    assert capsys.readouterr().err == (
        "warning: log.wandb: failed (Connection lost); nothing more is sent there, "
        "metrics.jsonl has everything\n"
    )
    assert not wandb.options("finish")


def test_the_real_wandb_offline(tmp_path):
    """What it wrote is looked for in its file, which keeps names and texts as they are."""
    pytest.importorskip("wandb", exc_type=ImportError)
    program = f"""
from pathlib import Path
from gpt.metrics import MetricsLog
with MetricsLog(Path({str(tmp_path)!r}), wandb=True) as log:
    for line in {LINES[:-1]!r}:
        log.write(line)
"""
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    quiet |= {"WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        for name in (*DRAWN, "vocab_size", "finding/spike", "loss 9 at step 18", "step"):
            assert name.encode() in content, name


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


class Tight:
    """A file on a disk with little room."""

    def __init__(self, path: Path, room: int) -> None:
        self.name, self.file, self.room = str(path), path.open("ab", buffering=0), room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(content)[: self.room]
        self.room -= len(part)
        return self.file.write(part)

    def close(self) -> None:
        self.file.close()


def test_lines_wait_for_room_on_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path)
    log._file.close()
    log._file = Tight(tmp_path / "metrics.jsonl", 30)  # type: ignore[assignment]
    for step in (1, 2, 3):
        log.write({"kind": "train", "step": step})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    assert capsys.readouterr().err.count("takes no more lines (No space left on device)") == 1
    log._file.room = 10**6  # type: ignore[attr-defined]
    log.write({"kind": "train", "step": 4})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    log._file.room = 0  # type: ignore[attr-defined]
    log.write({"kind": "train", "step": 5})
    log.close()
    assert "lacks its last 1 lines" in capsys.readouterr().err
