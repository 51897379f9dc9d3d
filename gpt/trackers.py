"""TensorBoard and W&B: a run's log, drawn while it goes; what fails there never ends the run.

What is logged, and what it means, is not decided here.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gpt.config import Config, LogConfig
from gpt.errors import UserError, say
from gpt.files import write_durably

Record = Mapping[str, Any]
# W&B's id of the run, so that a run that goes on is the same one there.
_ID_NAME = "run-id.txt"
_RENAMED = {"lrs": "lr"}
_MOST_STEPS = 2**62
_FLUSH_S = 10
# Events that somebody wants to be told of, and how loudly.
_ALERTS = {"finding": "WARN", "save_failed": "ERROR", "diverged": "ERROR"}


class Tracker(Protocol):
    """Somewhere else that a run is drawn."""

    def write(self, record: Record) -> None:
        """Takes one line of the log."""

    def close(self, *, failed: bool) -> None:
        """Sends what is left; `failed`: the run ended by an error."""


class Trackers:
    """The trackers of a run. One that fails is left out from then on, with a warning."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb: bool,
        config: Config | None,
        last_step: int | None,
    ) -> None:
        """Opens those that are wished for; `last_step` was logged last before, None: nothing was.

        Raises UserError if one is not installed, or does not start.
        """
        self._open: dict[str, Tracker] = {}
        if tensorboard:
            self._open["tensorboard"] = TensorBoard(run_dir, last_step)
        if wandb:
            self._open["wandb"] = WeightsAndBiases(run_dir, config, goes_on=last_step is not None)

    def write(self, record: Record) -> None:
        """Hands one line of the log to all."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.write, record))

    def close(self, *, failed: bool = False) -> None:
        """Ends all; `failed`: the run ended by an error."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.close, failed=failed))

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            del self._open[name]
            say(
                f"warning: log.{name}: failed ({_one_line(error)}); nothing more is sent there, "
                "metrics.jsonl has everything"
            )


class TensorBoard:
    """Event files in the run's folder `tensorboard`: numbers as scalars, events as texts."""

    def __init__(self, run_dir: Path, last_step: int | None) -> None:
        """Opens a new file beside those of earlier processes. Raises UserError."""
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _not_installed("tensorboard") from None
        # A run that goes on hides what the one before wrote past the checkpoint.
        purge = None if last_step is None else last_step + 1
        self._summary: Any = Summary
        self._writer: Any = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=purge, flush_secs=_FLUSH_S
        )

    def write(self, record: Record) -> None:
        """Draws the numbers; an event is written down in words."""
        step = step_of(record)
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in numbers(record).items()
        ]
        if values:
            # One event for a whole line: `add_scalar` would frame and sum up each number alone.
            self._writer.file_writer.add_summary(self._summary(value=values), step)
        if record.get("kind") == "event":
            self._writer.add_text(*_text(record), step)

    def close(self, *, failed: bool) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run at W&B, or in the run's folder `wandb` with WANDB_MODE=offline.

    The project is WANDB_PROJECT. Numbers are drawn over `step`, a finding is an alert.
    """

    def __init__(self, run_dir: Path, config: Config | None, *, goes_on: bool) -> None:
        """Starts the run there, or goes on with it. Raises UserError."""
        try:
            import wandb

            init: Callable[..., Any] = wandb.init
        except (ImportError, AttributeError):  # a folder called wandb imports too
            raise _not_installed("wandb") from None
        identity = _identity(run_dir / "wandb", goes_on=goes_on)
        try:
            self._run = init(
                project=os.environ.get("WANDB_PROJECT", "gpt-train"),
                name=config.run.name if config else run_dir.name,
                dir=str(run_dir),
                config=config.model_dump(mode="json") if config else None,
                allow_val_change=True,
                **identity,
            )
        except Exception as error:
            raise UserError(
                f"log.wandb: on, but W&B did not start ({_one_line(error)}); log in with "
                "`wandb login`, or set WANDB_MODE=offline, or log.wandb to false"
            ) from None
        # Not `_step`: a run that goes on writes some steps again, which W&B would drop.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Draws the numbers; tells the events that matter."""
        values = numbers(record)
        if values:
            self._run.log({**values, "step": step_of(record)})
        if record.get("kind") != "event":
            return
        if record.get("event") == "run":
            about = {key: value for key, value in record.items() if key not in _FRAME}
            self._run.config.update({"start": about}, allow_val_change=True)
        elif record.get("event") in _ALERTS and record.get("state") != "end":
            title, text = _text(record)
            self._run.alert(title=title, text=text, level=_ALERTS[str(record["event"])])

    def close(self, *, failed: bool) -> None:
        """Waits until all is sent."""
        self._run.finish(exit_code=1 if failed else 0)


_FRAME = ("kind", "step", "event", "state")


def numbers(record: Record) -> dict[str, float]:
    """The values that can be drawn, `kind/key`, or `kind/key/inner`; an event has none."""
    kind = str(record.get("kind", "train"))
    return {} if kind == "event" else _flat(record, f"{kind}/")


def _flat(record: Record, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, int | float) and key != "step":
            found[f"{prefix}{key}"] = float(value)
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{_RENAMED.get(key, key)}/")
    return found


def step_of(record: Record) -> int:
    """The record's step; 0 where it has none."""
    step = record.get("step", 0)
    return int(step) if isinstance(step, int | float) and abs(step) < _MOST_STEPS else 0


def _text(record: Record) -> tuple[str, str]:
    """An event as name and words, in Markdown, as both trackers show it."""
    name = str(record.get("event", "event"))
    if name == "sample":
        said = f"{record.get('prompt', '')}{record.get('text', '')}"
        return name, _clean("\n".join(f"    {line}" for line in said.splitlines() or [""]))
    if name == "finding":
        begins = record.get("state") != "end"
        parts = [str(record.get(key) or "") for key in ("evidence", "cause")]
        words = "; ".join(part for part in parts if part) if begins else "no longer so"
        advice = f"\n\n    {record['next']}" if begins and record.get("next") else ""
        return f"finding/{record.get('id', '')}", _clean(words + advice)
    values = {key: value for key, value in record.items() if key not in _FRAME}
    return f"event/{name}", _clean("  \n".join(f"{key}: {value}" for key, value in values.items()))


def _clean(text: str) -> str:
    """The text without halves of characters, which cannot be written."""
    return text.encode(errors="replace").decode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _identity(folder: Path, *, goes_on: bool) -> dict[str, str]:
    """What makes the processes of one run one run at W&B, unless the environment says it.

    Offline, W&B cannot go on with a run, and two of one id would overwrite each other when they are
    sent: there the processes are a group.
    """
    if "WANDB_RUN_ID" in os.environ or "WANDB_RESUME" in os.environ:
        return {}
    kept = _kept_id(folder, goes_on=goes_on)
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun", "disabled"):
        return {} if "WANDB_RUN_GROUP" in os.environ else {"group": kept}
    return {"id": kept, "resume": "allow"}


def _kept_id(folder: Path, *, goes_on: bool) -> str:
    """The id under which the run was begun, or a new one, which is kept."""
    path = folder / _ID_NAME
    if goes_on and path.is_file():
        kept = path.read_text(encoding="utf-8").strip()
        if kept.isalnum():
            return kept
    new = secrets.token_hex(4)
    folder.mkdir(exist_ok=True)
    write_durably(path, new.encode())
    return new


def check_installed(log: LogConfig) -> None:
    """Raises UserError where a tracker that is wished for is not installed; imports none."""
    for package in ("tensorboard", "wandb"):
        if getattr(log, package) and not _is_installed(package):
            raise _not_installed(package)


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name has none


def _not_installed(package: str) -> UserError:
    return UserError(
        f"log.{package}: on, but the package {package} is not installed; "
        f'pip install "gpt-train[track]", or set log.{package} to false'
    )
