"""Where a run stands: waiting, running, stopped or finished, and how it is continued."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gpt.config import Config
from gpt.files import open_plain
from gpt.health.advice import place_options
from gpt.history import History
from gpt.metrics import Record

try:
    import fcntl
except ImportError:  # Windows: whether a run is still going cannot be seen there
    fcntl = None  # type: ignore[assignment]

State = Literal["waiting", "running", "stopped", "finished", "ended"]


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        state: `ended`: a log that nobody can say more of.
        words: the state in words.
        go_on: the command that continues the run; empty where there is none.
        go_on_words: what that command does.
    """

    state: State
    words: str
    go_on: str = ""
    go_on_words: str = ""


def standing(history: History) -> Standing:
    """Judges from the log, and for a run of ours from its directory and its lock."""
    config, run = history.config, history.path
    if history.source == "gpt-train" and config is not None and run is not None:
        return _of_ours(history, config, run)
    at, total = history.last_step, history.total_steps
    if total is not None and at < total and not history.finished:
        return Standing("stopped", f"its log ends at step {at:,} of {total:,}")
    if total is not None:
        return Standing("finished", f"finished: all {total:,} steps are done")
    return Standing("ended", f"its log ends at step {at:,}; how long it was meant to be is unknown")


def is_running(run: Path) -> bool:
    """Whether another process holds the run's directory; False where the system cannot tell.

    The run's own process, which asks once it has trained, is no other.
    """
    try:
        with open_plain(run / ".lock") as lock:
            holder = lock.read(20).strip()
            if fcntl is None or not holder or holder == str(os.getpid()).encode():
                return False
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        pass
    return False


def _of_ours(history: History, config: Config, run: Path) -> Standing:
    at, total = history.last_step, history.total_steps
    again = ["gpt-train", "--config", str(run / "config.yaml"), *place_options(config, run)]
    go_on = shlex.join(again)
    if is_running(run):
        return Standing("running", "still running" if at else "running; no step is logged yet")
    if not len(history.train) and not len(history.evals):
        return Standing("waiting", "not begun: no step is logged", go_on, "trains it")
    if history.finished and total is not None and at >= total:
        longer = shlex.join([*again, *_longer(config, at)])
        words = f"finished: all {total:,} steps are done"
        return Standing("finished", words, longer, "would train it to twice its length")
    ending = _ending(history)
    if ending.get("event") == "diverged":
        words = f"stopped after step {at:,}: the {ending.get('what', 'loss')} was no finite number"
        return Standing("stopped", words, go_on, _from(run))
    if history.finished:
        reason = ending.get("how")
        why = f": {reason}" if reason else ""
        further = shlex.join([*again, *_beyond(history, config, str(reason))])
        return Standing("finished", f"finished at step {at:,}{why}", further, _from(run))
    return Standing("stopped", f"stopped at step {at:,}", go_on, _from(run))


def _ending(history: History) -> Record:
    """The event that the run's last process ended with; empty if it was cut off."""
    for event in reversed(history.events):
        if event.get("event") in ("end", "diverged"):
            return event
        if event.get("event") in ("resumed", "run"):
            break
    return {}


def _from(run: Path) -> str:
    """What the run would go on from, in words; a checkpoint has its manifest written last."""
    folders = sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8 + "*"))
    whole = [folder for folder in folders if (folder / "manifest.json").is_file()]
    if not whole:
        return "begins anew: it holds no checkpoint"
    return f"goes on from step {int(whole[-1].name.removeprefix('step-')):,}"


def _beyond(history: History, config: Config, reason: str) -> list[str]:
    """The options without which the run would end again where it did."""
    limit = config.train.max_time_s
    if "max_time_s" in reason and limit is not None:
        known = history.train["time_s"] if "time_s" in history.train else np.empty(0)
        taken = float(np.nanmax(known, initial=limit))
        return ["--train.max_time_s", f"{taken + limit:.6g}"]
    return ["--eval.patience", "null"] if "patience" in reason else []


def _longer(config: Config, steps: int) -> list[str]:
    """The options that train a finished run on, to twice its length."""
    train = config.train
    limits = {
        "max_steps": train.max_steps,
        "max_tokens": train.max_tokens,
        "max_epochs": train.max_epochs,
    }
    twice = {name: f"{2 * value:.12g}" for name, value in limits.items() if value is not None}
    twice = twice or {"max_steps": str(2 * steps)}
    words = [word for name, text in twice.items() for word in (f"--train.{name}", text)]
    return [*words, "--rate", "extend"]
