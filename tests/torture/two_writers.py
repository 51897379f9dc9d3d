"""Test 9: two runs on one directory, started at once."""

import random
import re
import time
from pathlib import Path

from gpt.config import Config
from gpt.rundir import run_path
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import Command, check_same, check_tidy, run, write_config


def make_config(folder: Path, name: str) -> Config:
    """Long enough that the second one meets the first."""
    return tiny_config(
        folder,
        run__name=name,
        run__dir=str(folder / "runs"),
        train__max_steps="150",
        checkpoint__every_steps="10",
        eval__every_steps="50",
    )


def prepare(shared: Path) -> None:
    """The run that is alone."""
    whole = make_config(shared, "whole")
    run(["gpt-train", "--config", str(write_config(whole, shared))], shared)


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Two starts, up to a tenth of a second apart; in every other case on a run that was begun."""
    shared = folder.parent
    config = make_config(shared, folder.name)
    command = ["gpt-train", "--config", str(write_config(config, folder))]
    begun = index % 2 == 1
    if begun:
        first = Command(command, folder)
        time.sleep(rng.uniform(0.2, 0.6))
        first.process.kill()
        first.wait()
    both = []
    for name in ("a", "b"):
        (folder / name).mkdir()
        both.append(Command(command, folder / name))
        time.sleep(rng.choice((0.0, rng.uniform(0, 0.1))))
    codes = [each.wait() for each in both]
    assert sorted(codes) == [0, 2], (
        f"exits {codes}:\n{both[0].said[-1500:]}\n{both[1].said[-1500:]}"
    )
    winner, loser = both if codes[0] == 0 else both[::-1]
    (line,) = loser.said.strip().splitlines()[-1:]
    holder = re.fullmatch(r"error: (?:.*: )?run.name: .* is in use by process (\d+); .*", line)
    assert holder, f"the loser said: {line}"
    assert int(holder[1]) == winner.pid, "the holder is not the one that is named"
    check_same(make_config(shared, "whole"), config)
    check_tidy(config)
    assert run_path(config).exists()
    return "on a run that was begun" if begun else "on a new run"


TORTURE = Torture(
    title="two runs on one directory, started at once",
    promise="exactly one runs, to the same end as alone; the other exits with 2 and names the "
    "process that holds the directory",
    full=20,
    short=2,
    case=case,
    prepare=prepare,
)
