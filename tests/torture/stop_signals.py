"""Test 6: SIGTERM and SIGINT in every phase of every long command, once and twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpt.config import Config
from gpt.metrics import read_metrics
from gpt.rundir import checkpoint_folders, newest_checkpoint, run_path, step_of
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import (
    Command,
    check_same,
    check_tidy,
    hear_interrupts,
    run,
    until,
    write_config,
)

# `make test` draws none with compile, which alone takes a minute.
PHASES = ["start", "step", "evaluation", "compile", "generate", "find", "sweep", "save"]
SIGNALS = [signal.SIGTERM, signal.SIGINT]
LRS = "3e-3,1e-2"


def make_config(folder: Path, name: str, **changes: str) -> Config:
    """A run that has every phase several times."""
    values = {
        "run__name": name,
        "run__dir": str(folder / "runs"),
        "model__dropout": "0.2",
        "train__max_steps": "30",
        "checkpoint__every_steps": "7",
        "eval__every_steps": "10",
    }
    return tiny_config(folder, **values | changes)


def prepare(shared: Path) -> None:
    """What comes out when nobody interrupts: a run, one of a compiled model, a sweep."""
    whole = make_config(shared, "whole")
    run(["gpt-train", "--config", str(write_config(whole, shared))], shared)
    base = make_config(shared, "base", eval__every_steps="30")
    run(sweep(base, shared, shared / "sweep"), shared)


def sweep(config: Config, folder: Path, out: Path) -> list[str]:
    """The command line of a sweep."""
    path = str(write_config(config, folder))
    return ["gpt-lr", "sweep", "--config", path, "--lrs", LRS, "--out", str(out)]


def case(index: int, rng: random.Random, folder: Path) -> str:
    """One phase, one signal, once or twice; then the command again, to its end."""
    phase = PHASES[index % len(PHASES)]
    number = SIGNALS[index // len(PHASES) % 2]
    doubled = index // len(PHASES) // 2 % 2 == 1
    shared = folder.parent
    stop = Stop(number, doubled, rng)
    match phase:
        case "start":
            at_the_start(stop, shared, folder)
        case "generate":
            while_generating(stop, shared, folder)
        case "find":
            while_finding(stop, folder)
        case "sweep":
            while_sweeping(stop, shared, folder)
        case _:
            while_training(phase, stop, shared, folder)
    return f"{phase}, {signal.Signals(number).name}{' twice' if doubled else ''}"


class Stop:
    """A signal to a command and its children, as a terminal sends it; once or twice."""

    def __init__(self, number: int, doubled: bool, rng: random.Random) -> None:
        """Takes what to send, and where its delays come from."""
        self.number, self.doubled, self.rng = number, doubled, rng

    def send(self, pid: int, within_s: float) -> None:
        """Sends it after a random delay, and perhaps once more after another."""
        for delay in [within_s] + [0.1] * self.doubled:
            time.sleep(self.rng.uniform(0, delay))
            try:
                os.killpg(pid, self.number)
            except ProcessLookupError:
                return

    def check_code(self, code: int, said: str) -> None:
        """Asserts how the command ended: as the shell knows it, and without a traceback."""
        assert code == 128 + self.number, f"exit {code}:\n{said[-3000:]}"
        assert "Traceback" not in said, said[-3000:]


def while_training(phase: str, stop: Stop, shared: Path, folder: Path) -> None:
    """The step that is in the making is saved; what was twice asked for may lose it."""
    changes = {"train__compile": "on"} if phase == "compile" else {}
    config = make_config(shared, folder.name, **changes)
    command = ["gpt-train", "--config", str(write_config(config, folder))]
    (folder / "count").write_text(str(stop.rng.randint(1, 3 if phase != "step" else 28)))
    started = Command(command, folder, MARKS[phase])
    assert until((folder / "here").exists, started), started.said
    stop.send(started.pid, 6 if phase == "compile" else 0.02)
    stop.check_code(started.wait(), started.said)
    path = run_path(config)
    steps = [int(line["step"]) for line in read_metrics(path) if line["kind"] == "train"]
    newest = newest_checkpoint(path)
    kept = step_of(newest) if newest else 0
    if not stop.doubled:
        assert kept == max(steps, default=0), "a step was not saved"
        check_tidy(config)
    way_on = rf"go on( with:)? +gpt-train --config {re.escape(str(path))}"
    assert re.search(way_on, started.said), started.said[-2000:]
    whole = make_config(shared, "whole")
    if phase == "compile":
        whole = compiled_whole(shared)
    ended = run(command, folder, 120)
    assert ended.process.exitcode == 0, ended.said[-3000:]
    check_same(whole, config)
    check_tidy(config)


def compiled_whole(shared: Path) -> Config:
    """The uninterrupted run of a compiled model, made when first asked for."""
    config = make_config(shared, "compiled", train__compile="on")
    if not run_path(config).exists():
        (shared / "compiled").mkdir()
        run(["gpt-train", "--config", str(write_config(config, shared))], shared / "compiled", 120)
    return config


def at_the_start(stop: Stop, shared: Path, folder: Path) -> None:
    """From the first instant of the interpreter on."""
    config = make_config(shared, folder.name)
    file = write_config(config, folder)
    program = "import sys; from gpt.cli.train import main; sys.exit(main(sys.argv[1:]))"
    with (folder / "said").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "--config", str(file)],
            stderr=stderr,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )
        stop.send(process.pid, 2.5)
        code = process.wait(60)
    said = (folder / "said").read_text()
    if code == 0:  # the signal came too late
        assert "all 30 steps are done" in said, said[-3000:]
    elif code == -stop.number:  # the system's own way, before anything was begun
        assert not run_path(config).exists() or checkpoint_folders(run_path(config)) == []
    else:
        stop.check_code(code, said)
    ended = run(["gpt-train", "--config", str(file)], folder)
    assert ended.process.exitcode == 0, ended.said[-3000:]
    check_same(make_config(shared, "whole"), config)
    check_tidy(config)


def while_generating(stop: Stop, shared: Path, folder: Path) -> None:
    """The text so far is there, whole characters only."""
    path = run_path(make_config(shared, "whole"))
    argv = ["gpt-infer", "--run", str(path), "--prompt", "the", "--samples", "5000"]
    started = Command(argv, folder)
    assert until(lambda: len(started.printed) > 3, started), started.said
    stop.send(started.pid, 0.3)
    stop.check_code(started.wait(), started.said)
    assert started.printed.startswith("--- sample 1/5000 ---\nthe")
    (folder / "stdout").read_bytes().decode("utf-8", "strict")


def while_finding(stop: Stop, folder: Path) -> None:
    """An answer is there whole, where it was just found, or not at all; and no run has begun."""
    config = make_config(folder, "searched", train__max_steps="2000")
    started = Command(["gpt-lr", "find", "--config", str(write_config(config, folder))], folder)
    until(lambda: "data:" in started.said, started)
    stop.send(started.pid, 1)
    stop.check_code(started.wait(), started.said)
    left = {path.name: path for path in (folder / "runs").rglob("*") if path.is_file()}
    assert left.keys() <= {"lr_find.json", "lr_find.png"}, f"left behind: {sorted(left)}"
    if "lr_find.json" in left:
        assert "lr" in json.loads(left["lr_find.json"].read_text())


def while_sweeping(stop: Stop, shared: Path, folder: Path) -> None:
    """The same command goes on, to the same table."""
    command = sweep(make_config(shared, "base", eval__every_steps="30"), folder, folder / "sweep")
    started = Command(command, folder)
    until(lambda: "cost " in started.said, started)
    stop.send(started.pid, 0.8)
    code = started.wait()
    if code != 0:  # it may have been over
        stop.check_code(code, started.said)
        assert stop.doubled or "go on with: gpt-lr sweep" in started.said, started.said[-2000:]
    ended = run(command, folder)
    assert ended.process.exitcode == 0, ended.said[-3000:]
    runs = [
        [(each["lr"], each["val_loss"]) for each in json.loads(path.read_text())["runs"]]
        for path in (shared / "sweep" / "sweep.json", folder / "sweep" / "sweep.json")
    ]
    assert runs[0] == runs[1]


def mark_at(folder: Path, owner: object, name: str, slow_s: float = 0) -> None:
    """Leaves a file where the function is called for the time that `count` says."""
    function = getattr(owner, name)
    left = [int((folder / "count").read_text())]

    def marked(*given: object, **named: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            (folder / "here").touch()
            time.sleep(slow_s)
        return function(*given, **named)

    setattr(owner, name, marked)


def mark_step(folder: Path) -> None:
    """A drawn step."""
    import gpt.train

    mark_at(folder, gpt.train, "train_step", slow_s=0.005)


def mark_evaluation(folder: Path) -> None:
    """A drawn evaluation, which takes its time."""
    import gpt.step
    import gpt.train

    mark_at(folder, gpt.train, "evaluate")
    batches = gpt.step.eval_batches

    def slowly(*given, **named):  # type: ignore[no-untyped-def]
        for batch in batches(*given, **named):
            time.sleep(0.004)
            yield batch

    gpt.step.eval_batches = slowly


def mark_save(folder: Path) -> None:
    """A drawn save."""
    import gpt.train

    mark_at(folder, gpt.train, "save_run")


def mark_compile(folder: Path) -> None:
    """The first step, which compiles; from scratch in most cases."""
    import gpt.train

    (folder / "count").write_text("1")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
    mark_at(folder, gpt.train, "train_step")


MARKS: dict[str, Callable[[Path], None]] = {
    "step": mark_step,
    "evaluation": mark_evaluation,
    "save": mark_save,
    "compile": mark_compile,
}

TORTURE = Torture(
    title="SIGTERM and SIGINT in every phase: start, step, evaluation, save, compile, generate, "
    "find, sweep; single and doubled",
    promise="the step in the making is saved, exit 143 or 130, no traceback; what goes on is exact",
    full=100,
    short=7,
    case=case,
    prepare=prepare,
    timeout_s=240,
)
