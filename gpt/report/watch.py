"""A run that is still going, shown again and again until it ends."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt.errors import UserError
from gpt.foreign import files_below
from gpt.metrics import METRICS_NAME
from gpt.report.judged import Judged, has_not_begun, judge, open_history
from gpt.report.standing import is_running

EVERY_S = 5.0
Stamp = tuple[tuple[int, int], ...]


def watch(
    paths: Sequence[Path],
    show: Callable[[Sequence[Judged]], None],
    wait: Callable[[Sequence[Path]], None],
    *,
    every_s: float = EVERY_S,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Judged]:
    """Shows the runs whenever their logs have changed, until none goes on or Ctrl-C is pressed.

    `wait` is told once which runs have not begun. A log is read only when its size or time has
    changed. Returns the runs as they were shown last; an empty list if they never began.

    Raises UserError where a log cannot be read.
    """
    runs: list[Judged] = []
    last: tuple[Stamp, ...] | None = None
    told = False
    try:
        while True:
            missing = [path for path in paths if not _has_begun(path)]
            if missing:
                if not told:
                    wait(missing)
                    told = True
                sleep(every_s)
                continue
            # Before reading: what is written meanwhile is seen the next time.
            going = [_goes_on(path) for path in paths]
            stamps = tuple(_stamp(path) for path in paths)
            if stamps != last or (runs and not any(going)):
                runs = [judge(open_history(path)) for path in paths]
                show(runs)
                last = stamps
            if not any(
                goes_on and run.standing.state != "finished"
                for goes_on, run in zip(going, runs, strict=True)
            ):
                return runs
            sleep(every_s)
    except KeyboardInterrupt:
        return runs


def _has_begun(path: Path) -> bool:
    """Whether there is a log with any line in it."""
    if path.is_dir() and (path / METRICS_NAME).exists():
        return (path / METRICS_NAME).stat().st_size > 0
    if path.is_file():
        return path.stat().st_size > 0
    return path.exists() and not has_not_begun(path) and bool(files_below(path))


def _goes_on(path: Path) -> bool:
    """Whether more may come: of a run of ours while it is held, of another log always."""
    if (path / "config.yaml").is_file() and (path / METRICS_NAME).is_file():
        return is_running(path)
    return True


def _stamp(path: Path) -> Stamp:
    """Size and time of the log's files: of a folder all, since the log may lie deeper in it."""
    log = path / METRICS_NAME
    files = [log] if log.is_file() else files_below(path) if path.is_dir() else [path]
    stamps = [stamp for file in files if (stamp := _stamp_of(file)) is not None]
    if not stamps:
        raise UserError(f"{path}: went away while it was watched; start again")
    return tuple(stamps)


def _stamp_of(file: Path) -> tuple[int, int] | None:
    """Size and time; None for a file that is there no more, such as an old checkpoint."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
