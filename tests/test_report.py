"""`gpt-report`: what it prints, what it exits with, where it says a run stands."""

import fcntl
import io
import json
import math
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt.cli.report import main
from gpt.health.finding import IDS, Finding
from gpt.history import History, Table, history_of, read_run
from gpt.plot import smooth
from gpt.report import coverage, judged, words
from gpt.report.answer import answer, strict
from gpt.report.coverage import coverage as coverage_of
from gpt.report.judged import judge
from gpt.report.page import page
from gpt.report.standing import is_running, standing
from gpt.report.summary import summarize
from gpt.report.terminal import command, run_page, runs_page
from tests.report_runs import FINDINGS, config_of, demo, event, records, write_run


def report(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(stdout), redirect_stderr(io.StringIO()) as stderr:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own
            code = int(end.code or 0)
        stdout.flush()
        printed = stdout.buffer.getvalue().decode()
    return code, printed, stderr.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "demo", records())


@pytest.fixture
def unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagnosis finds FINDINGS in every run."""
    monkeypatch.setattr(judged, "diagnose", lambda history: FINDINGS)


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagnosis finds nothing."""
    monkeypatch.setattr(judged, "diagnose", lambda history: [])


@pytest.mark.usefixtures("healthy")
def test_a_healthy_run_exits_0_and_says_so(run: Path) -> None:
    code, out, err = report(run)
    assert code == 0, err
    assert "healthy, nothing wrong can be seen" in out
    assert "\x1b" not in out
    for words_of in ("step 2,000 of 2,000 (100%)", "bits/byte", "3e-05 first", "tokens/s", "norm"):
        assert words_of in out


@pytest.mark.usefixtures("unhealthy")
@pytest.mark.parametrize("width", [60, 80, 140])
def test_findings_exit_3_and_fit_the_terminal(
    run: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(run.parent.parent)
    code, out, _ = report("runs/demo")
    assert code == 3
    joined = " ".join(out.split())
    for finding in FINDINGS:
        assert f"{finding.id}: {words.title(finding)}" in joined
        assert finding.evidence in joined
        assert finding.cause in joined
        assert finding.next in joined.replace(" \\ ", " ")
    assert "steps 1,200 to 1,260" in out
    assert max(len(line) for line in out.splitlines()) <= width


def test_every_finding_has_words_and_needs() -> None:
    assert set(words.TITLES) == set(IDS)
    assert set(coverage._CHECKS) == set(IDS)


def test_a_broken_command_can_be_pasted() -> None:
    text = "gpt-train --config 'a b/config.yaml' --optimizer.betas '[0.9,  0.95]' --run.name x"
    lines = command("next", text, 50)
    assert len(lines) > 1
    assert all(line.endswith(" \\") for line in lines[:-1])
    pasted = "\n".join(lines).removeprefix("next")
    shown = subprocess.run(
        ["bash", "-c", f"set -- {pasted}\nprintf '%s\\n' \"$@\""],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = ["gpt-train", "--config", "a b/config.yaml"]
    assert shown == [*expected, "--optimizer.betas", "[0.9,  0.95]", "--run.name", "x"]
    assert command("next", "look at the text, line by line", 30)[0].startswith("next     look")


@pytest.mark.parametrize("width", [50, 100])
def test_what_is_said_of_a_command_does_not_disturb_it(width: int) -> None:
    text = "gpt-train --config 'a # b/config.yaml' --model.dropout 0.2"
    said = "isn't more text better; gpt-infer takes the best one anyway"
    lines = command("next", f"{text} # {said}", width)
    assert max(map(len, lines)) <= width
    assert " ".join(line.strip(" #") for line in lines if line.lstrip().startswith("#")) == said
    pasted = "\n".join(lines).removeprefix("next")
    script = f"gpt-train() {{ printf '%s\\n' \"$@\"; }}\n{pasted}\n"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == shlex.split(text)[1:]
    assert not ended.stderr


@pytest.mark.usefixtures("unhealthy")
def test_json_is_strict_and_keeps_the_contract(run: Path) -> None:
    code, out, _ = report(run, "--json")
    assert code == 3
    told = json.loads(out, parse_constant=pytest.fail)
    assert told["healthy"] is False
    first = told["findings"][0]
    assert set(first) == {
        *("id", "first_step", "last_step", "evidence", "cause", "next", "numbers"),
    }
    assert [finding["id"] for finding in told["findings"]] == [f.id for f in FINDINGS]
    assert first["numbers"] == {"rise": 2.2, "worst": "Infinity"}
    assert told["findings"][1]["last_step"] is None
    assert told["final"]["step"] == 2000
    assert told["final"]["val_loss"] == pytest.approx(2.5, abs=0.01)
    assert out.count("\n") == 1


def test_numbers_that_do_not_exist_are_null() -> None:
    history = history_of([{"kind": "train", "step": 1, "loss": math.nan}])
    final = json.loads(answer([judge(history, [])]), parse_constant=pytest.fail)["final"]
    assert final["train_loss"] is None
    assert final["val_loss"] is None
    assert final["lr_peak"] is None
    assert strict({"a": [math.nan, -math.inf, 1, None, True, "x"]}) == {
        "a": ["NaN", "-Infinity", 1, None, True, "x"]
    }


def test_what_could_not_be_checked_is_said() -> None:
    history = history_of([{"kind": "train", "step": step, "loss": 3.0} for step in range(1, 5)])
    lines = " ".join(" ".join(run_page(judge(history, []), 100)).split())
    assert "judged from training loss" in lines
    assert "dead_layer (no layers)" in lines
    assert "overfitting (no validation loss)" in lines
    told = json.loads(answer([judge(history, [])]))
    assert {"id": "throughput", "lacks": ["speed"]} in told["not_checked"]
    assert not coverage_of(demo()).unmade
    assert unmade(history.until(3))["plateau"] == ("4 training losses",)


def unmade(history: History) -> dict[str, tuple[str, ...]]:
    return {each.id: each.lacks for each in coverage_of(history).unmade}


STEPS = np.arange(1.0, 1001)
NOISE = 0.03 * np.random.default_rng(0).normal(size=1000)
CURVE = 2 + 6.3 * (1 + STEPS / 5) ** -0.5 + NOISE
BARE = {
    "nonfinite": {"loss": np.full(1000, math.nan)},
    "stuck_at_chance": {"loss": math.log(50257) + 0.1 * NOISE},
    "lr_too_small": {"loss": 5 + 0.1 * NOISE},
    "warmup_too_short": {"loss": CURVE + 3 * np.exp(-(((STEPS - 60) / 10) ** 2))},
    "throughput": {"loss": CURVE, "step_time_s": np.where(STEPS > 600, 9.0, 2.0)},
}


@pytest.mark.parametrize("name", BARE)
def test_what_was_found_is_not_called_unchecked(name: str) -> None:
    none = Table.from_records([])
    history = History("bare", "csv", Table({"step": STEPS, **BARE[name]}), none, none)
    found = {finding.id: finding for finding in judge(history).findings}
    assert name in found
    assert name not in unmade(history)
    if name == "throughput":
        assert found[name].evidence.startswith("0.111 steps/s from step ")
        assert found[name].evidence.endswith(", 0.5 before")


def test_a_run_that_broke_at_once_was_checked_for_it() -> None:
    history = history_of([event(0, "diverged", what="loss", cause="rate")])
    assert [finding.id for finding in judge(history).findings] == ["nonfinite"]
    assert "nonfinite" not in unmade(history)
    assert unmade(history_of([]))["nonfinite"] == ("loss",)


def test_what_no_rule_reads_makes_no_check() -> None:
    none = Table.from_records([])
    train = Table({"step": STEPS, "loss": CURVE, "time_s": STEPS, "lr": 1 / STEPS})
    lacks = unmade(History("bare", "csv", train, none, none))
    assert lacks["throughput"] == ("speed",)
    assert lacks["data_order"] == ("config",)
    assert lacks["no_decay"] == ("planned length",)
    assert lacks["stuck_at_chance"] == ("vocabulary",)
    assert lacks["wrong_tokenizer"] == ("data check", "vocabulary")
    train.columns["lr"][-3:] = math.nan
    lacks = unmade(History("bare", "csv", train, none, none, total_steps=1000))
    assert lacks["no_decay"] == ("rate at the end",)


def test_nothing_logged_is_not_called_healthy() -> None:
    lines = "\n".join(run_page(judge(history_of([]), []), 100))
    assert "nothing to judge yet" in lines
    assert "healthy" not in lines


def test_what_is_found_is_told_however_little_there_is() -> None:
    broken = [{"kind": "train", "step": 1, "loss": "NaN"}, {"kind": "train", "step": 2}]
    history = history_of([line | {"loss": math.nan} for line in broken])
    found = judge(history)
    assert [finding.id for finding in found.findings] == ["nonfinite"]
    assert words.verdict(found) == "1 finding"
    assert "nothing to judge yet" not in page([found])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nowhere",), "nowhere"),
        (("RUN", "--every", "2"), "--watch"),
        (("RUN", "--watch", "--every", "soon"), "--every soon"),
        (("RUN", "--watch", "--every", "nan"), "--every nan"),
        (("RUN", "--steps", "5"), "--probe"),
        (("RUN", "--probe", "double", "--steps", "0"), "--steps 0"),
        (("RUN", "RUN", "--probe", "double"), "--probe"),
        (("RUN", "--probe", "double", "--watch"), "--watch"),
        (("RUN", "--html", "FOLDER"), "is a folder"),
        (("RUN", "--html", "FILE/page.html"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    run: Path, arguments: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    places = {"RUN": str(run), "FOLDER": str(tmp_path)}
    typed = [places.get(a, a.replace("FILE", str(tmp_path / "file"))) for a in arguments]
    code, _, err = report(*typed)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert named in err


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "new", [])
    (folder / "metrics.jsonl").unlink()
    code, _, err = report(folder)
    assert code == 2
    assert "has not begun" in err
    assert "--watch" in err


def test_no_torch_and_quick_help(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from gpt.cli.report import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'plotly', 'plotext', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"code = main([{str(run)!r}, '--html', {str(tmp_path / 'x.html')!r}])\n"
        "assert code in (0, 3), code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.usefixtures("healthy")
def test_probe_comes_after_the_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def probe(path: Path, kind: str, steps: int | None) -> SimpleNamespace:
        asked.append((path, kind, steps))
        return SimpleNamespace(lines=lambda: ["probe: lower"], json=lambda: {"gain": 0.1})

    monkeypatch.setitem(sys.modules, "gpt.report.probe", SimpleNamespace(probe=probe))
    code, out, _ = report(run, "--probe", "cooldown", "--steps", "20")
    assert code == 0
    assert out.rstrip().endswith("probe: lower")
    assert asked == [(run, "cooldown", 20)]
    told = json.loads(report(run, "--probe", "double", "--json")[1])
    assert told["probe"] == {"gain": 0.1}
    assert asked[1][2] is None


def test_standing_of_our_runs(tmp_path: Path) -> None:
    lines = records(steps=200)
    done = standing(read_run(write_run(tmp_path / "done", lines)))
    assert done.state == "finished"
    assert "--train.max_steps 4000 --rate extend" in done.go_on

    half = [line for line in lines if line["step"] <= 100]
    own = config_of("half way", run__dir=str(tmp_path))
    run = write_run(tmp_path / "half way", half, own)
    stopped = standing(read_run(run))
    assert (stopped.state, stopped.words) == ("stopped", "stopped at step 100")
    assert stopped.go_on == f"gpt-train --config '{run}/config.yaml'"
    assert "begins anew" in stopped.go_on_words
    for step, manifest in ((50, True), (100, False)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if manifest:
            (folder / "manifest.json").write_text("{}")
    assert standing(read_run(run)).go_on_words == "goes on from step 50"

    broken = [*half, event(100, "diverged", what="gradient", loss=2.0)]
    words_of = standing(read_run(write_run(tmp_path / "broken", broken))).words
    assert words_of == "stopped after step 100: the gradient was no finite number"
    resumed = [*broken, event(100, "resumed"), lines[-1] | {"step": 110, "how": "stopped"}]
    words_of = standing(read_run(write_run(tmp_path / "resumed", resumed))).words
    assert words_of == "stopped at step 100"
    over = [*half, event(100, "end", how="train.max_time_s 60 is over")]
    timed = standing(read_run(write_run(tmp_path / "timed", over)))
    assert timed.state == "finished"
    assert timed.words == "finished at step 100: train.max_time_s 60 is over"

    empty = standing(read_run(write_run(tmp_path / "empty", [])))
    assert empty.state == "waiting"


def test_standing_of_a_running_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "live", [line for line in records() if line["step"] <= 500])
    assert not is_running(run)
    (run / ".lock").write_text("")
    assert not is_running(run)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("123")
        lock.flush()
        assert is_running(run)
        assert standing(read_run(run)).state == "running"
    assert not is_running(run)
    with (run / ".lock").open("w") as lock:  # as the run's process does, at its own end
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        assert standing(read_run(run)).state == "stopped"
    # Asking does not hold the lock.
    with (run / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_standing_of_other_logs() -> None:
    history = demo()
    other = {**history.__dict__, "source": "csv", "config": None, "total_steps": None}
    assert standing(History(**other)).state == "ended"
    assert standing(History(**{**other, "total_steps": 2000})).state == "finished"
    short = {**other, "total_steps": 9000, "finished": False}
    assert "step 2,000 of 9,000" in standing(History(**short)).words


def test_summary_of_a_run() -> None:
    summary = summarize(demo())
    assert summary.step == summary.total_steps == 2000
    assert summary.train_loss == pytest.approx(2.4, abs=0.05)
    assert summary.best_train_loss is not None
    assert summary.best_train_loss <= summary.train_loss
    assert summary.lr_peak_step == 100
    assert summary.lr_peak == pytest.approx(3e-3, rel=0.02)
    assert summary.seconds_left == 0
    assert 0 < (summary.clipped_share or 0) < 0.3


def test_summary_counts_steps_not_lines_for_clipping() -> None:
    rows = [(10, 0.0), (20, 1.0), (100, 0.0)]
    history = history_of(
        [{"kind": "train", "step": s, "loss": 1.0, "clipped_share": c} for s, c in rows]
    )
    assert summarize(history).clipped_share == pytest.approx(0.1)


def test_one_enormous_loss_leaves_the_means_of_the_others() -> None:
    losses = np.where(STEPS == 100, 1e20, 5.0)
    none = Table.from_records([])
    summary = summarize(History("x", "csv", Table({"step": STEPS, "loss": losses}), none, none))
    assert summary.train_window > 1
    assert (summary.train_loss, summary.best_train_loss) == (5.0, 5.0)
    for enormous in (1e20, -1e20):
        losses[99] = enormous
        smoothed = smooth(range(1000), losses.tolist())
        assert smoothed[-1] == pytest.approx(5.0)
        assert abs(smoothed[99]) > 1e6
    assert smooth(range(3), [0.0, 1e20, 0.0]) == [0.0, 1e20, 0.0]


def test_the_plot_marks_where_findings_begin() -> None:
    page = list(run_page(judge(demo(), FINDINGS), 100))
    top = next(line for line in page if "2, 3" in line)
    assert top.index("1") < top.index("2, 3")  # the second and the third begin side by side
    assert sum("┊" in line for line in page) > 8
    plain = "\n".join(run_page(judge(demo(), FINDINGS), 100, fancy=False))
    plot = plain[plain.index("+--") : plain.rindex("--+")]
    assert plot.isascii()


def test_control_characters_never_reach_the_terminal() -> None:
    bad = Finding("spike", 5, "\x1b[2J rose", "\x9bcause", "gpt-lr \x07find", numbers={})
    history = history_of(records(steps=200), name="a\x1b]0;title\x07")
    lines = [*run_page(judge(history, [bad]), 80), *runs_page([judge(history, [bad])] * 2, 80)]
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for line in lines for c in line)


@pytest.mark.usefixtures("unhealthy")
def test_several_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "worse", records(seed=1, shift=0.2))
    page = tmp_path / "page.html"
    code, out, _ = report(run, other, "--html", page)
    assert code == 3
    assert out.splitlines()[0].split()[:3] == ["run", "state", "step"]
    assert "worse against demo" in out
    assert page.exists()
    told = json.loads(report(run, other, "--json")[1], parse_constant=pytest.fail)
    assert [each["name"] for each in told["runs"]] == ["demo", "worse"]
    assert set(told["runs"][0]) >= {"healthy", "findings", "final"}
    assert told["comparison"]["pairs"][0]["gaps"]


def test_a_narrow_terminal_gets_no_table() -> None:
    runs = [judge(demo(name), []) for name in ("first", "second")]
    lines = list(runs_page(runs, 50))
    assert max(map(len, lines)) <= 50
    assert "first" in lines


def test_tables_with_gaps_are_read() -> None:
    train = Table.from_records([{"step": 1, "loss": 2.0}, {"step": 2, "lr": 0.1}])
    history = History("x", "csv", train, Table.from_records([]), Table.from_records([]))
    summary = summarize(history)
    assert summary.train_loss == 2.0
    assert summary.lr_last == 0.1
