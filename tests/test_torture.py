"""A few cases of each torture test; all of them: `make torture`."""

import shutil
from pathlib import Path

import pytest

from tests.torture import MODULES, SEED, load, random_of, spread

CHUNKS = [
    pytest.param(number, cases, id=f"{number}-{MODULES[number]}-{cases[0]}")
    for number, torture in ((number, load(number)) for number in MODULES)
    for cases in (
        spread(torture.short, torture.full)[i : i + torture.chunk]
        for i in range(0, torture.short, torture.chunk)
    )
    if cases
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What the cases of one test compare with, made once in each process."""
    return {}


@pytest.mark.parametrize(("number", "cases"), CHUNKS)
def test_torture(
    number: int,
    cases: list[int],
    shared: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    torture = load(number)
    if number not in shared:
        shared[number] = tmp_path_factory.mktemp(f"torture-{number}")
        if torture.prepare is not None:
            torture.prepare(shared[number])
    for case in cases:
        folder = shared[number] / f"case-{case}"
        folder.mkdir()
        told = torture.case(case, random_of(SEED, number, case), folder)
        assert told, "a case must say what happened"
        shutil.rmtree(folder, ignore_errors=True)
