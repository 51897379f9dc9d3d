"""How threads wait: briefly where other work is on the machine, else as OpenMP has it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt.cli import threads


@pytest.mark.parametrize(
    ("told", "running", "turns"),
    [
        ({}, 0, None),
        ({}, 64, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, 64, "7"),
        ({"OMP_WAIT_POLICY": "active"}, 64, None),
    ],
)
def test_threads_wait_briefly_on_a_busy_machine_unless_told(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], running: float, turns: str | None
) -> None:
    monkeypatch.setattr(os, "environ", told)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(threads, "others_running", lambda: running)
    threads.wait_briefly_if_busy()
    assert told.get("GOMP_SPINCOUNT") == turns


@pytest.mark.parametrize(
    ("text", "running"),
    [("1.50 0.9 0.5 5/312 4711", 4), ("0 0 0 1/9 7", 0), ("0 0 0 0/9 7", 0), ("none", 0)],
)
def test_what_runs_is_read_from_linux(tmp_path: Path, text: str, running: float) -> None:
    source = tmp_path / "loadavg"
    assert threads.others_running(source) == 0, "there is no such file"
    source.write_text(text)
    assert threads.others_running(source) == running


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what runs")
def test_other_work_is_seen_while_it_runs() -> None:
    work = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 20
        while threads.others_running() < 2:
            assert time.monotonic() < deadline
    finally:
        for each in work:
            each.kill()
            each.wait()
