"""The diagnosis while a run goes on: each finding is told once, and its end once."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import gpt.health.watch
from gpt.health.finding import Finding
from gpt.health.watch import News, Watch
from gpt.history import History
from gpt.metrics import read_metrics
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.health_runs import STEPS, Line, config_of, event, layers, sound, steps_of
from tests.test_health import flat_from

AT = steps_of()
SLOW_THEN_FAST = np.where((AT > 600) & (AT < 1300), 0.3, 1.0) * 7e4


def follow(lines: Sequence[Line], watch: Watch) -> list[tuple[int, str, bool]]:
    """What is told while these lines are written: at which step, which finding, begin or end."""
    told = []
    for line in lines:
        watch.add(line)
        if line["kind"] == "train":
            step = int(line["step"])
            told += [(step, news.finding.id, news.begins) for news in watch.look(step)]
    return told


def as_lines(step: int, news: Sequence[News]) -> list[Line]:
    """What a run writes of it."""
    return [
        event(
            step,
            "finding",
            state="begin" if begins else "end",
            id=found.id,
            first_step=found.first_step,
            evidence=found.evidence,
            cause=found.cause,
            next=found.next,
        )
        for found, begins in news
    ]


def new_watch(records: Sequence[Line] = (), total: int = STEPS) -> Watch:
    return Watch("made-up", config_of(), total, list(records))


def test_nothing_is_told_of_a_sound_run() -> None:
    assert follow(sound(), new_watch()) == []


def test_a_finding_begins_once_and_ends_once() -> None:
    """A slow stretch: from the moment that it is certain until the speed is back."""
    told = follow(sound(tokens_per_s=SLOW_THEN_FAST), new_watch())
    assert [(name, begins) for _, name, begins in told] == [("throughput", True)]
    assert 620 < told[0][0] < 800


def test_a_finding_that_ends_is_told_to_have_ended() -> None:
    """A plateau from 300 on, which the loss leaves at 1,200."""
    losses = flat_from(300) - np.clip((AT - 1200) / 400, 0, 1)
    told = follow(sound(loss=losses), new_watch())
    assert [(name, begins) for _, name, begins in told] == [("plateau", True), ("plateau", False)]
    assert 1200 < told[1][0] < 1400


class Script:
    """Stands for the diagnosis: the finding is there in looks for which `present` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, present: Sequence[bool]) -> None:
        self.present = list(present)
        monkeypatch.setattr(gpt.health.watch, "diagnose", self)

    def __call__(self, history: History) -> list[Finding]:
        found = Finding("spike", first_step=5, evidence="e", cause="c", next="n")
        return [found] if self.present.pop(0) else []


def looks(watch: Watch, steps: Sequence[int]) -> list[tuple[int, bool]]:
    return [(step, news.begins) for step in steps for news in watch.look(step, now=True)]


def test_a_finding_that_goes_and_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [False, True, True, False, False])
    assert looks(new_watch(), [0, 10, 20, 30, 40]) == [(10, True), (30, False)]


def test_the_end_says_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [True, False])
    watch = new_watch()
    (begins,), (ends,) = watch.look(10, now=True), watch.look(20, now=True)
    assert (begins.begins, begins.finding.last_step) == (True, None)
    assert (ends.begins, ends.finding.last_step, ends.finding.first_step) == (False, 20, 5)


def test_one_that_wavers_does_not_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and gone in every other of 1,000 looks."""
    Script(monkeypatch, [look % 2 == 0 for look in range(1000)])
    told = looks(new_watch(), range(10, 10_010, 10))
    assert 2 <= len(told) <= 24
    assert [begins for _, begins in told] == [True, False] * (len(told) // 2)


def test_it_looks_a_hundred_times_in_a_run_or_when_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(monkeypatch, [False] * 2000)
    watch = new_watch()
    for step in range(1, STEPS + 1):
        watch.look(step)
    assert 2000 - len(script.present) == pytest.approx(100, abs=1)
    watch.look(STEPS, now=True)
    assert 2000 - len(script.present) == pytest.approx(101, abs=1)


def test_a_run_that_goes_on_is_not_told_again() -> None:
    """Another process takes up the log in the middle of a finding; it tells the end alone."""
    lines = [*sound(tokens_per_s=SLOW_THEN_FAST)]
    written: list[Line] = []
    first = new_watch()
    cut = next(i for i, line in enumerate(lines) if line.get("step") == 1000)
    begun = []
    for line in lines[:cut]:
        first.add(line)
        written.append(line)
        news = first.look(int(line["step"]), now=line["kind"] == "train")
        begun += news
        for told in as_lines(int(line["step"]), news):
            first.add(told)
            written.append(told)
    assert [(n.finding.id, n.begins) for n in begun] == [("throughput", True)]
    second = new_watch(written)
    assert second.look(1000, now=True) == []
    ended = new_watch([*written, event(1000, "finding", state="end", id="throughput")])
    assert [(n.finding.id, n.begins) for n in ended.look(1000, now=True)] == [("throughput", True)]


def test_a_finding_that_an_earlier_process_told_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, [False])
    begun = event(50, "finding", state="begin", id="spike", first_step=40, evidence="e")
    (news,) = new_watch([begun]).look(60, now=True)
    assert (news.finding.id, news.begins) == ("spike", False)
    assert (news.finding.first_step, news.finding.last_step) == (40, 60)


@pytest.mark.parametrize(
    "odd",
    [
        {"kind": "event", "event": "finding"},
        {"kind": "event", "event": "finding", "id": 7, "first_step": None},
        {"kind": "event", "event": "finding", "id": "spike", "first_step": "x"},
        {"kind": "event", "event": "finding", "id": None, "state": "end"},
        {"kind": "event", "event": "nonfinite"},
        {"kind": "event", "event": "nonfinite", "step": float("nan")},
        {"kind": "event", "event": "diverged", "step": 3, "rows": "x", "cause": 5},
        {"kind": "event", "event": "data_check", "duplicate_share": "much", "leak_share": None},
    ],
)
def test_odd_lines_of_an_earlier_process_raise_nothing(odd: Line) -> None:
    new_watch([odd]).look(10, now=True)


def test_a_look_at_ten_thousand_lines_takes_a_moment() -> None:
    """Every signal there is, and layers; the best of three on a busy machine."""
    steps = np.arange(1, 10_001.0)
    columns = {f"more_{n}": steps for n in range(8)}
    watch = Watch("made-up", config_of(train__max_steps="10000"), 10_000, [])
    for line in [*sound(steps=steps, **columns), *layers(range(200, 10_001, 200))]:
        watch.add(line)
    took = []
    for _ in range(3):
        start = time.process_time()
        watch.look(10_000, now=True)
        took.append(time.process_time() - start)
    print(f"a look at 10,000 lines: {min(took):.3f} s")
    assert min(took) < 0.2


def test_a_run_writes_what_it_finds(
    make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate a hundred times too large: told on the console and in the log."""
    config = make_config(
        train__max_steps="120",
        optimizer__lr="10",
        schedule__warmup_steps="10",
        eval__every_steps="120",
        checkpoint__every_steps="120",
    )
    train(config)
    records = read_metrics(Path(config.run.dir) / config.run.name)
    told = [(r["id"], r["state"]) for r in records if r.get("event") == "finding"]
    assert told[0] == ("lr_too_large", "begin")
    assert len(told) <= 4
    found = next(r for r in records if r.get("event") == "finding")
    assert f"warning: lr_too_large: {found['evidence']}" in capsys.readouterr().err
    assert set(found) >= {"first_step", "last_step", "evidence", "cause", "next", "numbers"}
