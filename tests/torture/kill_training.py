"""Test 1: kill -9 while training, at any instant, restarted to the end."""

import random
import shutil
import time
from pathlib import Path

from gpt.config import Config
from gpt.metrics import read_metrics
from gpt.rundir import run_path
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import Command, check_same, check_tidy, run, write_config

MAX_KILLS = 3


def make_config(folder: Path, name: str) -> Config:
    """Dropout, accumulation, a guard, and saves and evaluations off one another's grid."""
    return tiny_config(
        folder,
        run__name=name,
        run__dir=str(folder / "runs"),
        model__dropout="0.2",
        train__micro_batch_size="2",
        train__max_steps="120",
        train__spike_sigma="6",
        checkpoint__every_steps="7",
        eval__every_steps="20",
        eval__sample_tokens="3",
        log__every_steps="1",
    )


def prepare(shared: Path) -> None:
    """The run that nobody interrupts, and how long it takes."""
    whole = make_config(shared, "whole")
    run(["gpt-train", "--config", str(write_config(whole, shared))], shared)
    start = time.perf_counter()
    again = make_config(shared, "again")
    run(["gpt-train", "--config", str(write_config(again, shared))], shared)
    (shared / "seconds").write_text(str(time.perf_counter() - start))
    check_same(whole, again)


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Kills up to three times at random instants, then lets the run end."""
    shared = folder.parent
    seconds = float((shared / "seconds").read_text())
    config = make_config(shared, folder.name)
    command = ["gpt-train", "--config", str(write_config(config, folder))]
    wanted, kills = rng.randint(1, MAX_KILLS), []
    while len(kills) < wanted:
        started = Command(command, folder)
        time.sleep(rng.uniform(0, seconds))
        started.process.kill()
        if started.wait() == -9:
            records = read_metrics(run_path(config))
            kills.append(max((int(record["step"]) for record in records), default=-1))
        elif kills:
            break
        else:  # it was over before the first kill: another run
            shutil.rmtree(run_path(config))
    ended = run(command, folder)
    assert ended.process.exitcode == 0, ended.said[-3000:]
    check_same(make_config(shared, "whole"), config)
    check_tidy(config)
    times = "once" if len(kills) == 1 else f"{len(kills)} times"
    return f"killed {times}" + (", before the first step too" if -1 in kills else "")


TORTURE = Torture(
    title="kill -9 while training, at any instant, up to three times, restarted to the end",
    promise="weights, optimizer, generators and every logged loss equal the uninterrupted run's "
    "bits; no step twice",
    full=200,
    short=2,
    case=case,
    prepare=prepare,
)
