"""Test 2: kill -9 while a checkpoint is being saved, where every step saves one."""

import random
import re
import time
from pathlib import Path

from gpt.checkpoint import verify_checkpoint
from gpt.config import Config
from gpt.metrics import read_metrics
from gpt.rundir import checkpoint_folders, run_path, step_of
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import Command, check_same, check_tidy, run, until, write_config

STEPS = 16
KEEP = 3


def make_config(folder: Path, name: str) -> Config:
    """Every step is a save, every third an evaluation that may make it the best."""
    return tiny_config(
        folder,
        run__name=name,
        run__dir=str(folder / "runs"),
        model__n_embd="64",  # so that a save takes longer than a step
        model__dropout="0.1",
        train__max_steps=str(STEPS),
        checkpoint__every_steps="1",
        checkpoint__keep=str(KEEP),
        eval__every_steps="3",
    )


def prepare(shared: Path) -> None:
    """The run that nobody interrupts, and how long a step and its save take, about."""
    whole = make_config(shared, "whole")
    command = run(["gpt-train", "--config", str(write_config(whole, shared))], shared)
    assert command.process.exitcode == 0, command.said
    times = [path.stat().st_mtime for path in checkpoint_folders(run_path(whole))[-2:]]
    (shared / "seconds").write_text(str(times[1] - times[0]))


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Kills within the time of a save, from when the temporary folder of a drawn step is seen."""
    shared = folder.parent
    config = make_config(shared, folder.name)
    path = run_path(config)
    command = ["gpt-train", "--config", str(write_config(config, folder))]
    step = rng.randint(1, STEPS)
    temporary = path / "checkpoints" / f".tmp-step-{step:08d}"
    started = Command(command, folder)
    seen = until(temporary.exists, started)
    time.sleep(rng.uniform(0, 0.5 * float((shared / "seconds").read_text())))
    started.process.kill()
    killed = started.wait() == -9
    told = "ended before it was killed"
    if killed:
        told = "killed while saving" if temporary.exists() else "killed between two saves"
        if any((path / "checkpoints").glob(".tmp-drop*")):
            told = "killed while dropping an old one"
    assert seen or not killed
    check_nothing_lost(path, started.said)
    ended = run(command, folder)
    assert ended.process.exitcode == 0, ended.said[-3000:]
    check_same(make_config(shared, "whole"), config)
    check_tidy(config)
    return told


def check_nothing_lost(path: Path, said: str) -> None:
    """Every published checkpoint is whole, what was called saved is there, one step is repeated."""
    folders = checkpoint_folders(path)
    for checkpoint in folders:
        verify_checkpoint(checkpoint)
    newest = step_of(folders[-1]) if folders else 0
    saved = [int(step) for step in re.findall(r"saved .*step-(\d+)", said)]
    assert newest >= max(saved, default=0), f"step {max(saved)} was called saved, {newest} is there"
    assert len(folders) <= KEEP + 2, "the best, a new one that is not counted yet, and the newest K"
    taken = [int(record["step"]) for record in read_metrics(path) if record["kind"] == "train"]
    assert max(taken, default=0) - newest <= 1, "more than one step is lost"


TORTURE = Torture(
    title="kill -9 while saving, every step a save",
    promise="no checkpoint is lost, at most one interval is repeated, nothing temporary is left "
    "after the restart, the end is the uninterrupted run's to the bit",
    full=300,
    short=2,
    case=case,
    prepare=prepare,
)
