"""Torture: numbered tests of many independent cases, each of which can be run again alone.

A case is a function of its number and a random generator that depends on (seed, test, case) only.
It raises AssertionError where a promise is broken, and returns a word on what happened to it, so
that a count of those words shows that the torture reached what it is for. `tests/test_torture.py`
runs a few cases of each test, `scripts/torture.py` all of them and keeps the record.
"""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODULES = {
    1: "kill_training",
    2: "kill_saving",
    3: "resume_everywhere",
    4: "full_disk",
    5: "damage",
    6: "stop_signals",
    9: "two_writers",
    10: "any_config",
    11: "hostile_files",
    12: "any_prompt",
    13: "broken_numbers",
    14: "long_run",
    15: "any_schedule",
}
SEED = 2026


@dataclass(frozen=True)
class Torture:
    """One test of the plan.

    Attributes:
        title: what is done to the program, in a line.
        promise: what must hold in every case.
        full: the number of cases that `make torture` runs.
        short: how many of them, spread evenly over all, `make test` runs.
        case: takes the case's number, its random generator and an empty folder.
        prepare: makes once, in a folder that the cases of one process share (the parent of a case's
            folder), what they compare with.
        chunk: cases that `make test` counts as one test.
        timeout_s: after which a case is hung.
        alone: cases must not share the machine with others.
    """

    title: str
    promise: str
    full: int
    short: int
    case: Callable[[int, random.Random, Path], str]
    prepare: Callable[[Path], None] | None = None
    chunk: int = 1
    timeout_s: float = 120
    alone: bool = False


def load(number: int) -> Torture:
    """The test with this number of the plan."""
    torture = importlib.import_module(f"tests.torture.{MODULES[number]}").TORTURE
    assert isinstance(torture, Torture)
    return torture


def random_of(seed: int, number: int, case: int) -> random.Random:
    """The generator of one case."""
    return random.Random(f"{seed} {number} {case}")


def spread(count: int, full: int) -> list[int]:
    """`count` case numbers, evenly over all."""
    return sorted({i * full // count for i in range(min(count, full))})
