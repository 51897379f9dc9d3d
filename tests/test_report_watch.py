"""`gpt-report --watch`: reads what changed, waits for what is not there, ends when it should."""

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.report import watch as watching
from gpt.report.judged import Judged
from gpt.report.watch import watch
from tests.report_runs import records, write_run
from tests.test_report import report

LINES = records(steps=200)


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The run's lock, as its process holds it."""
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("123")
        lock.flush()
        yield


def append(run: Path, lines: Sequence[object]) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)


class Clock:
    """Each sleep does the next thing; after the last one Ctrl-C is pressed."""

    def __init__(self, *things: Callable[[], object]) -> None:
        self.things = list(things)
        self.slept: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        if not self.things:
            raise KeyboardInterrupt
        self.things.pop(0)()


def look(run: Path, clock: Clock) -> tuple[list[int], list[Path], list[Judged]]:
    """Watches; the last step of each showing, what was waited for, and what was returned."""
    shown: list[int] = []
    waited: list[Path] = []
    runs = watch(
        [run],
        lambda runs: shown.append(runs[0].summary.step),
        waited.extend,
        every_s=2.0,
        sleep=clock,
    )
    return shown, waited, runs


def test_a_finished_run_is_shown_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "done", LINES)
    clock = Clock()
    shown, waited, runs = look(run, clock)
    assert (shown, waited, clock.slept) == ([200], [], [])
    assert runs[0].standing.state == "finished"


def test_only_changes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "live", [line for line in LINES if line["step"] <= 100])
    read: list[Path] = []
    before = watching.open_history
    monkeypatch.setattr(watching, "open_history", lambda path: (read.append(path), before(path))[1])
    rest = [line for line in LINES if line["step"] > 100]
    with held(run):
        clock = Clock(lambda: None, lambda: None, lambda: append(run, rest), lambda: None)
        shown, _, runs = look(run, clock)
    assert shown == [100, 200]
    assert len(read) == 2
    assert clock.slept == [2.0] * 5, "as long as the run holds its lock it may write more"
    assert runs[0].summary.step == 200


def test_ctrl_c_is_the_way_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "live", [line for line in LINES if line["step"] <= 100])
    with held(run):
        shown, _, runs = look(run, Clock())
    assert shown == [100]
    assert runs[0].standing.state == "running"


def test_a_run_that_stops_is_shown_as_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "live", [line for line in LINES if line["step"] <= 100])
    lock = held(run)
    lock.__enter__()
    shown, _, runs = look(run, Clock(lambda: lock.__exit__(None, None, None)))
    assert shown == [100, 100]
    assert runs[0].standing.state == "stopped"


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "later"
    clock = Clock(
        lambda: run.mkdir(),
        lambda: (write_run(run, []), (run / "metrics.jsonl").unlink()),
        lambda: (run / "metrics.jsonl").touch(),
        lambda: append(run, LINES),
    )
    shown, waited, _ = look(run, clock)
    assert waited == [run], "said once"
    assert shown == [200]
    none = look(tmp_path / "never", Clock())
    assert none == ([], [tmp_path / "never"], [])


def test_a_log_that_lies_deeper_in_the_folder(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "version_0" / "metrics.csv"
    old = tmp_path / "logs" / "checkpoints" / "old.ckpt"

    def write(*steps: int) -> None:
        log.write_text("step,train_loss\n" + "".join(f"{step},2.5\n" for step in steps))

    def begin() -> None:
        for file in (log, old):
            file.parent.mkdir(parents=True)
        old.write_text("weights")
        write(1, 2)

    clock = Clock(log.parent.parent.mkdir, begin, lambda: write(1, 2, 3), old.unlink)
    shown, waited, _ = look(tmp_path / "logs", clock)
    assert waited == [tmp_path / "logs"]
    assert shown == [2, 3, 3]


def test_a_file_that_is_gone_before_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,train_loss\n1,2.5\n")
    monkeypatch.setattr(watching, "files_below", lambda folder: [log, folder / "gone.ckpt"])
    assert look(tmp_path, Clock())[0] == [1]
    monkeypatch.setattr(watching, "files_below", lambda folder: [folder / "gone.ckpt"])
    with pytest.raises(UserError, match="went away while it was watched"):
        look(tmp_path, Clock())


def test_the_command_watches_to_the_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "done", LINES)
    page = tmp_path / "page.html"
    code, out, err = report(run, "--watch", "--every", "0.1", "--html", page)
    assert code in (0, 3)
    assert out.startswith("done: step 200 of 200")
    assert "verdict" in out
    assert "\x1b" not in out
    assert str(page) in err
    assert '"reload_s":null' in page.read_text(encoding="utf-8")


def test_a_live_page_reloads_and_the_last_one_does_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "live", [line for line in LINES if line["step"] <= 100])
    page = tmp_path / "page.html"
    with held(run):
        program = "from gpt.cli.report import main; raise SystemExit(main())"
        options = ["--watch", "--every", "0.1", "--html", str(page)]
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(run), *options], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("live: step 100 of 200")
        while not page.exists():
            time.sleep(0.02)
        assert '"reload_s":2.0' in page.read_text(encoding="utf-8")
        append(run, [line for line in LINES if line["step"] > 100])
        assert process.stdout.readline().startswith("live: step 200 of 200")
    rest = process.communicate(timeout=20)[0]
    assert process.returncode in (0, 3)
    assert "verdict" in rest
    assert '"reload_s":null' in page.read_text(encoding="utf-8")
