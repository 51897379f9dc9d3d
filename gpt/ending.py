"""How a run ends: by which limit, where it stands then, and what to type to go on."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt.checkpoint import Training
from gpt.config import Config
from gpt.errors import UserError, say
from gpt.health.diagnose import verdict
from gpt.history import read_run
from gpt.metrics import duration
from gpt.plot import plot_run
from gpt.report.page import write_report
from gpt.rundir import checkpoint_folders, step_of
from gpt.schedule import Plan

STEPS, TIME, PATIENCE, STOPPED = "steps", "time", "patience", "stopped"


def reached_limit(config: Config, plan: Plan, step: int, seconds: float) -> str:
    """Which of its limits the run has reached; empty if none."""
    if step >= plan.total_steps:
        return STEPS
    limit = config.train.max_time_s
    return TIME if limit is not None and seconds >= limit else ""


def reached_patience(training: Training) -> str:
    """The same for evaluations that fail to get better."""
    patience, waited = training.config.eval.patience, training.progress.evals_since_best
    return PATIENCE if patience is not None and waited >= patience else ""


def in_words(ending: str, training: Training, plan: Plan) -> str:
    """Why the run ended, for people."""
    match ending:
        case "steps":
            return f"all {plan.total_steps:,} steps are done"
        case "time":
            return f"train.max_time_s {training.config.train.max_time_s:g} is over"
        case "patience":
            waited = training.progress.evals_since_best
            return f"{waited} evaluations without a better one (eval.patience)"
    return ending


def command(run: Path, *more: str) -> str:
    """What goes on with a run, as it can be typed."""
    return shlex.join(["gpt-train", "--config", str(run / "config.yaml"), *more])


def further(run: Path, ending: str, training: Training) -> str:
    """The command that takes the run further than where it ended."""
    match ending:
        case "steps":
            limits = {
                name: 2 * limit
                for name in ("max_steps", "max_tokens", "max_epochs")
                if (limit := getattr(training.config.train, name)) is not None
            }
            twice = [word for name in limits for word in (f"--train.{name}", f"{limits[name]}")]
            return command(run, "--rate", "extend", *twice)
        case "time":
            seconds = training.progress.seconds + (training.config.train.max_time_s or 0)
            return command(run, "--train.max_time_s", f"{seconds:.6g}")
        case "patience":
            return command(run, "--eval.patience", "null")
    return command(run)


def way_on(run: Path) -> str:
    """The same in words, for a run that ended in the middle."""
    return f"go on with: {command(run)}"


@contextmanager
def telling_where_it_stands(run: Path) -> Iterator[None]:
    """If an error or a signal ends what is done inside: a line of what is kept, and what to type.

    A mistake that is found before the run has begun needs none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, UserError) or (run / "config.yaml").exists():
            say(standing(run))
        raise


def standing(run: Path) -> str:
    """Where a run stands that ended in the middle, and how it goes on, in a line."""
    if kept := checkpoint_folders(run):
        return f"stands   {run} at step {step_of(kept[-1]):,}, saved; {way_on(run)}"
    if (run / "config.yaml").exists():
        return f"stands   {run} has no checkpoint yet; {way_on(run)}"
    return f"stands   {run} had not begun; the same command begins it"


def report(run: Path, training: Training, plan: Plan, ending: str) -> None:
    """Where the run stands, in a picture and a few lines, and what to type next."""
    progress = training.progress
    say(
        f"end      {in_words(ending, training, plan)}: step {progress.step:,} of "
        f"{plan.total_steps:,}, {progress.tokens:,} tokens in {duration(progress.seconds)}"
    )
    if progress.best_val_loss is not None:
        say(f"best     val loss {progress.best_val_loss:.4f} at step {progress.best_step:,}")
    if ending != STOPPED:
        picture, page = run / "curve.png", run / "report.html"
        quoted = shlex.quote(str(run))
        with _warning("no picture or report", f"; later: gpt-report {quoted}"):
            plot_run(run, picture)
            write_report(run, page)
            say(f"picture  {picture}")
            say(f"report   {page}, or in words: gpt-report {quoted}")
        with _warning("no verdict"):
            say(f"verdict  {verdict(read_run(run))}")
        say(f'try it   gpt-infer --run {quoted} --prompt "..."')
    say(f"go on    {further(run, ending, training)}")


@contextmanager
def _warning(lacks: str, more: str = "") -> Iterator[None]:
    """What cannot be told of a run does not change how it ended: it is a warning."""
    try:
        yield
    except UserError as error:
        say(f"warning: {lacks} ({'; '.join(error.lines)}){more}")
    except OSError as error:
        say(f"warning: {lacks} ({error.strerror or error}){more}")
