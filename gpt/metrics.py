"""What a run says of itself: the console line and metrics.jsonl; and reading it back.

What the numbers mean, and whether they are healthy, is not decided here.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from gpt.config import Config
from gpt.errors import UserError, put, say, shown
from gpt.files import open_plain, write_durably
from gpt.trackers import Trackers, step_of

METRICS_NAME = "metrics.jsonl"
LINE_BYTES = 2**20  # a longer line is none of ours
MOST_BYTES = 2**32
Record = dict[str, Any]

_DECODER = json.JSONDecoder()
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Writes records to a run's metrics.jsonl, and to TensorBoard and W&B where wished for."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Config | None = None,
    ) -> None:
        """Opens the file for appending; run `truncate_after` first when resuming.

        `config` is what W&B shows beside the run. Raises UserError if TensorBoard or W&B is wished
        for and not installed.
        """
        before = each_record(run_dir) if tensorboard or wandb else iter(())
        self._trackers = Trackers(
            run_dir,
            tensorboard=tensorboard,
            wandb=wandb,
            config=config,
            last_step=max((step_of(record) for record in before), default=None),
        )
        # Unbuffered: a line is with the operating system, in one call, before `write` returns.
        self._file = (run_dir / METRICS_NAME).open("ab", buffering=0)
        self._unwritten = bytearray()
        self._refused = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record as one line; it survives whatever happens to this process.

        What a full disk does not take is kept, and written before the next record.
        """
        text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
        # Half a character, as a text may hold, becomes a question mark.
        self._unwritten += text.encode(errors="replace") + b"\n"
        self._write_out()
        self._trackers.write(record)

    def _write_out(self) -> None:
        try:
            while self._unwritten:  # a disk that is nearly full takes a part
                del self._unwritten[: self._file.write(self._unwritten)]
            self._refused = False
        except OSError as error:
            if not self._refused:
                say(
                    f"warning: {self._file.name} takes no more lines ({error.strerror}); they are "
                    "kept, and written once there is room"
                )
            self._refused = True

    def close(self, *, failed: bool = False) -> None:
        """Closes the file and the trackers; `failed`: the run ended by an error."""
        self._write_out()
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            say(f"warning: {self._file.name} lacks its last {lines:,} lines: there was no room")
        self._file.close()
        self._trackers.close(failed=failed)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(failed=exception[:1] != (None,))


def _plain(value: Any) -> Any:  # noqa: ANN401
    """The value with non-finite numbers as text, since JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _number(value: Any) -> Any:  # noqa: ANN401
    """The opposite of `_plain`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _number(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    return value


def read_metrics(run_dir: Path) -> list[Record]:
    """The records of a run; no file is no records, and lines torn by a crash are left out."""
    return list(each_record(run_dir))


def each_record(run_dir: Path) -> Iterator[Record]:
    """The same, one after another: a long run's lines need not be held together."""
    return (record for _, record in _lines(run_dir / METRICS_NAME))


def read_records(path: Path) -> list[Record]:
    """The same for a file in the format of metrics.jsonl, whatever it is called."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """The whole lines of the file: as written, and read."""
    try:
        file = open_plain(path, MOST_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        whole = True
        while line := file.readline(LINE_BYTES):
            begins, whole = whole, line.endswith(b"\n")
            if not (begins and whole):
                continue
            try:
                text = line.decode().strip("\ufeff \t\r\n")
                record, end = _DECODER.raw_decode(text)  # loads takes four times as long
                if end < len(text):
                    continue
                if 'NaN"' in text or 'Infinity"' in text:
                    record = _number(record)
            except (ValueError, RecursionError):  # torn, not UTF-8, or nested without end
                continue
            if isinstance(record, dict):
                yield line, record


def truncate_after(
    run_dir: Path,
    step: int,
    next_batch: float = math.inf,
    evaluated_step: float = math.inf,
) -> None:
    """Drops what was written after `step`, and torn lines, so that a resume repeats no step.

    What comes again is dropped too: events of batches from `next_batch` on, and evaluations after
    `evaluated_step`. The file is replaced as a whole: a crash leaves the old one or the new one.
    """
    path = run_dir / METRICS_NAME

    def kept() -> Iterator[bytes]:
        for line, record in _lines(path):
            last = min(step, evaluated_step) if _evaluates(record) else step
            again = record.get("kind") == "event" and _number_of(record, "batch", -1) >= next_batch
            if _number_of(record, "step") <= last and not again:
                yield line

    if path.exists() and sum(map(len, kept())) < path.stat().st_size:
        write_durably(path, kept())


def _evaluates(record: Mapping[str, Any]) -> bool:
    return record.get("kind") == "eval" or record.get("event") == "sample"


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror}); move it away, the run goes on without it"
    )


def _number_of(record: Mapping[str, Any], name: str, default: float = 0) -> float:
    number = record.get(name, default)
    return number if isinstance(number, int | float) and math.isfinite(number) else default


class Console:
    """Progress for people, on stderr: a bar on a terminal, plain lines in a log.

    With a `title` it is that of one run out of many: the bar, with the title, and warnings alone.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        title: str = "",
    ) -> None:
        """Takes the steps of the whole run, and how many were done before this process."""
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._total_steps = total_steps
        self._bar: tqdm[NoReturn] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                miniters=1,
                bar_format="{desc}|{bar:20}| {n_fmt}/{total_fmt}{postfix}",
                desc=title,
                leave=not title,
            )

    def step(
        self, record: Mapping[str, Any], *, log: bool = True, left_s: float | None = None
    ) -> None:
        """Shows a completed step; `record` has the fields of a `train` line.

        Without a terminal only steps with `log` are printed. `left_s` is the time left in seconds.
        """
        if self._bar is None and (not log or self._title):
            return  # most steps of a log: a short step should not wait for a text
        text = progress_text(record, left_s)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(int(record["step"]) - self._bar.n)
        else:
            self._print(f"step {record['step']}/{self._total_steps}  {text}")

    def line(self, text: str) -> None:
        """Prints a line; above the bar, if there is one."""
        if self._title and not text.startswith("warning:"):
            return
        if self._bar is not None:
            self._bar.write(shown(text), file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        """Leaves the bar as it is and frees the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        put(shown(text), self._stream)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def progress_text(record: Mapping[str, Any], left_s: float | None = None) -> str:
    """The fields of a `train` record that people watch, those that it has."""
    formats = {
        "loss": "loss {:.4f}",
        "lr": "lr {:.2e}",
        "grad_norm": "grad {:.2f}",
        "tokens_per_s": "{:,.0f} tok/s",
    }
    parts = [
        text.format(record[key]) for key, text in formats.items() if record.get(key) is not None
    ]
    if left_s is not None and math.isfinite(left_s):
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A duration in at most two units: `42s`, `1m40s`, `3h05m`, `2d04h`."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"
