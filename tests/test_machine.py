"""What the machine does while a run trains."""

import io
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import gpt.machine
from gpt.machine import MachineMeter

KEYS = {"memory_bytes", "cpu_share", "others_share", "major_faults"}


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_readings_have_sane_ranges() -> None:
    meter = MachineMeter(torch.device("cpu"))
    for _ in range(3):
        spin(0.02)
        reading = meter.read()
        assert set(reading) == KEYS
        memory, share = reading["memory_bytes"], reading["cpu_share"]
        assert memory is not None
        assert 50e6 < memory < 1e12
        assert share is not None
        assert 0 <= share <= 1.5 * (os.cpu_count() or 1)
        if sys.platform.startswith("linux"):
            assert isinstance(reading["major_faults"], int)
            assert reading["major_faults"] >= 0
            others = reading["others_share"]
            assert others is not None
            assert 0 <= others <= 1


def test_a_reading_is_of_the_time_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks by hand: 6 CPU seconds of 10 with 2 threads, and 20 of 4 cores' 40 by others."""
    clocks = {"wall": 100.0, "cpu": 50.0, "busy": 1000.0, "faults": 7}
    monkeypatch.setattr(gpt.machine.time, "perf_counter", lambda: clocks["wall"])
    monkeypatch.setattr(gpt.machine.time, "process_time", lambda: clocks["cpu"])
    monkeypatch.setattr(gpt.machine, "_busy_seconds", lambda: clocks["busy"])
    monkeypatch.setattr(gpt.machine, "_major_faults", lambda: clocks["faults"])
    monkeypatch.setattr(gpt.machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    meter = MachineMeter(torch.device("cpu"))
    clocks |= {"wall": 110.0, "cpu": 56.0, "busy": 1026.0, "faults": 10}
    reading = meter.read()
    assert (reading["cpu_share"], reading["others_share"]) == (0.3, 0.5)
    assert reading["major_faults"] == 3
    clocks |= {"wall": 111.0, "cpu": 58.0, "busy": 1028.0}
    reading = meter.read()
    assert (reading["cpu_share"], reading["others_share"], reading["major_faults"]) == (1, 0, 0)


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc and no resource usage, as elsewhere: None, and no guess."""
    monkeypatch.setattr(gpt.machine.Path, "open", lambda *_, **__: io.StringIO())
    monkeypatch.setattr(gpt.machine, "_major_faults", lambda: None)
    monkeypatch.setattr(gpt.machine, "peak_memory_bytes", lambda _: 0)
    reading = MachineMeter(torch.device("cpu")).read()
    assert reading["memory_bytes"] is reading["others_share"] is reading["major_faults"] is None


def test_no_proc_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError(tmp_path)

    monkeypatch.setattr(gpt.machine.Path, "open", absent)
    assert gpt.machine._busy_seconds() is None


def test_a_reading_costs_next_to_nothing() -> None:
    meter = MachineMeter(torch.device("cpu"))
    start = time.process_time()
    for _ in range(100):
        meter.read()
    assert (time.process_time() - start) / 100 < 2e-3
