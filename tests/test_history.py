"""A run's log as columns, and whether the run has ended."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.history import MOST_LATE, HistoryLog, Table, TableRows, finite, history_of, read_run
from tests.conftest import ConfigMaker
from tests.health_runs import Line, event
from tests.report_runs import records, write_run


def train_line(step: int, **values: object) -> Line:
    return {"kind": "train", "step": step, "loss": 3.0, **values}


def test_a_table_has_a_column_for_each_number() -> None:
    table = Table.from_records(
        [
            {"step": 1, "loss": 3.5, "clipped": True, "text": "no number", "lrs": {"a": 1, "b": 2}},
            {"step": 2, "grad_norm": None, "lrs": {"a": 3}, "loss": math.nan},
            {"loss": 1.0},
            {"step": math.nan, "loss": 1.0},
            {"step": 3, "loss": 10**400, "deep": {"er": {"x": 5}}},
        ]
    )
    assert len(table) == 3
    assert table["step"].tolist() == [1, 2, 3]
    assert table["loss"][0] == 3.5
    assert math.isnan(table["loss"][1])
    assert table["loss"][2] == math.inf
    assert table["clipped"][0] == 1
    assert table["deep/er/x"][2] == 5
    assert "text" not in table.columns
    assert np.isnan(table["never"]).all()
    assert len(table["never"]) == 3
    assert "loss" in table
    assert "never" not in table
    assert {name: values.tolist()[0] for name, values in table.named("lrs").items()} == {
        "a": 1,
        "b": 2,
    }
    assert math.isnan(table["lrs/b"][1])


def test_a_column_of_no_finite_number_is_not_there() -> None:
    table = Table.from_records([{"step": 1, "lr": math.nan}, {"step": 2, "lr": math.inf}])
    assert "lr" not in table
    assert "lr" in table.columns
    steps, values = finite(np.array([1.0, 2, 3]), np.array([5.0, math.nan, 7]))
    assert (steps.tolist(), values.tolist()) == ([1, 3], [5, 7])


def test_an_empty_table() -> None:
    table = Table.from_records([])
    assert len(table) == 0
    assert table["loss"].size == 0
    assert table.until(5)["step"].size == 0
    empty = history_of([])
    assert (empty.last_step, empty.finished, empty.chance) == (0, False, None)
    assert empty.start == empty.data_check == {}


def test_until_is_what_was_known_then() -> None:
    whole = history_of(records(steps=2000))
    half = whole.until(1000)
    assert (half.last_step, whole.last_step) == (1000, 2000)
    assert half.train["loss"].tolist() == whole.train["loss"][: len(half.train)].tolist()
    assert half.evals["step"].max() <= 1000
    assert half.layers["step"].max() <= 1000
    assert all(e["step"] <= 1000 for e in half.events)
    assert (half.total_steps, half.vocab_size) == (2000, 4096)
    assert half.unigram_entropy == 6.2
    assert whole.finished
    assert not half.finished
    assert whole.until(2000).finished


RUN = event(0, "run", total_steps=100, vocab_size=300)


@pytest.mark.parametrize(
    ("lines", "finished"),
    [
        ([RUN, train_line(50)], False),
        ([RUN, train_line(100)], True),
        ([RUN, train_line(50), event(50, "end", how="train.max_time_s 5 is over")], True),
        ([RUN, train_line(50), event(50, "end", how="stopped")], False),
        ([RUN, train_line(50), event(50, "diverged", what="loss")], True),
        ([RUN, train_line(50), event(50, "end", how="x"), event(50, "resumed")], False),
        (
            [RUN, event(50, "end", how="x"), event(50, "resumed"), event(60, "end", how="y")],
            True,
        ),
        ([RUN, train_line(99), event(99, "nonfinite", what="loss")], False),
        ([train_line(100)], False),
    ],
)
def test_whether_a_run_has_ended(lines: list[Line], finished: bool) -> None:
    assert history_of(lines).finished is finished


def test_the_last_run_event_counts() -> None:
    """A run that goes on with more steps says so in another one."""
    longer = event(100, "run", total_steps=200, vocab_size=300, device="cuda")
    history = history_of([RUN, train_line(100), event(100, "resumed"), longer, train_line(150)])
    assert history.total_steps == 200
    assert history.start["device"] == "cuda"
    assert not history.finished
    assert history.chance == pytest.approx(math.log(300))


def test_lines_that_come_one_by_one_are_the_same_history() -> None:
    lines = records(steps=400)
    log = HistoryLog(name="run")
    for number, line in enumerate(lines):
        log.add(line)
        if number % 37 == 0 or number == len(lines) - 1:
            at_once, so_far = history_of(lines[: number + 1]), log.history()
            assert so_far.events == at_once.events
            for kind in ("train", "evals", "layers"):
                one, other = getattr(so_far, kind).columns, getattr(at_once, kind).columns
                assert set(one) == set(other)
                for name, values in one.items():
                    np.testing.assert_array_equal(values, other[name], name)


def test_a_history_does_not_change_when_more_is_written() -> None:
    log = HistoryLog()
    log.add(train_line(1))
    early = log.history()
    for step in range(2, 500):
        log.add(train_line(step, new=step))
    assert len(early.train) == 1
    assert early.train["step"].tolist() == [1]
    assert len(log.history().train) == 499


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"kind": 7},
        {"kind": "train"},
        {"kind": "train", "step": "x"},
        {"kind": "train", "step": None},
        {"kind": ["train"], "step": 1},
        {"kind": "event", "step": [], "event": "run"},
        {"kind": "event", "event": "run", "total_steps": "many", "vocab_size": -3},
        {"kind": "event", "event": "data_check", "unigram_entropy": "low"},
    ],
)
def test_odd_lines_are_left_out(odd: Line) -> None:
    history = history_of([odd, train_line(3)])
    assert history.train["step"].tolist() == [3]
    assert history.total_steps is history.vocab_size is history.unigram_entropy is None


def test_reading_a_run(tmp_path: Path, make_config: ConfigMaker) -> None:
    run = write_run(tmp_path / "demo", records(steps=200))
    history = read_run(run)
    assert (history.name, history.path, history.source) == ("demo", run, "gpt-train")
    assert history.config is not None
    assert history.last_step == 200
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(210)) + "\n" + '{"kind": "train", "step": 220, "lo')
    assert read_run(run).last_step == 210, "a line that a crash has torn is none"
    (run / "config.yaml").unlink()
    assert read_run(run).config is None
    with pytest.raises(UserError, match="no metrics"):
        read_run(tmp_path / "nowhere")


def test_a_log_that_is_full_is_held_as_if_it_were_written_less_often() -> None:
    """Each row is what the line would be with a multiple of log.every_steps."""
    rng = np.random.default_rng(0)
    losses, skipped = rng.normal(3, 0.1, 1000), rng.integers(0, 3, 1000)
    log = HistoryLog(most=64)
    for i in range(1000):
        record = {"kind": "train", "step": i + 1, "loss": losses[i], "loss_mean": losses[i]}
        record |= {"loss_max": losses[i], "grad_norm_max": -losses[i], "skipped": int(skipped[i])}
        if i >= 500:
            record["late"] = float(i)
        log.add(record)
    train = log.history().train
    lines = 16  # the least power of 2 with which they fit
    parts = [slice(i, i + lines) for i in range(0, 1000, lines)]
    assert len(train) == len(parts) <= 64
    assert train["step"].tolist() == [min(1000, part.stop) for part in parts]
    assert train["loss"].tolist() == [losses[part][-1] for part in parts]
    assert train["loss_mean"] == pytest.approx([losses[part].mean() for part in parts])
    assert train["loss_max"].tolist() == [losses[part].max() for part in parts]
    assert train["grad_norm_max"].tolist() == [(-losses[part]).max() for part in parts]
    assert train["skipped"].tolist() == [skipped[part].sum() for part in parts]
    assert train["late"][-1] == 999
    assert np.isnan(train["late"][: 500 // lines]).all()


def test_a_log_within_its_limit_is_held_as_it_is() -> None:
    log = HistoryLog(most=64)
    for i in range(64):
        log.add({"kind": "train", "step": i, "loss": float(i)})
    assert log.history().train["loss"].tolist() == [*range(64)]


def test_a_log_with_a_new_name_on_each_line_takes_no_more_for_it() -> None:
    rows = TableRows()
    for step in range(20_000):
        rows.add({"step": step, f"odd {step}": 1.0})
    assert len(rows.table().columns) <= MOST_LATE
    early = TableRows()
    early.add({"step": 1, **{f"layer {i}": 1.0 for i in range(3000)}})
    assert len(early.table().columns) == 3001
