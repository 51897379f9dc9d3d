"""A step whose numbers are not finite: passed over, or the end of the run, with what to type."""

import shlex
from pathlib import Path

from torch import Tensor

from gpt.autopsy import LOST_WEIGHT, Autopsy, examine, out_of_range
from gpt.checkpoint import Training
from gpt.config import Config
from gpt.configfile import under_new_name
from gpt.errors import UserError
from gpt.lr.rates import rate_options
from gpt.record import Recorder
from gpt.rundir import newest_checkpoint
from gpt.step import NonFiniteError


def skip_broken(
    run: Path,
    training: Training,
    recorder: Recorder,
    error: NonFiniteError,
    batch: tuple[Tensor, Tensor],
) -> None:
    """Passes over a batch whose loss or gradient is not finite; ends the run after too many.

    It ends at once where the weights are what is broken: no other batch could be better.
    """
    progress = training.progress
    autopsy = examine(training, *batch)
    recorder.skipped_batch(
        "nonfinite",
        what=error.what,
        loss=error.loss,
        grad_norm=error.grad_norm,
        **autopsy.record(),
    )
    if progress.skips_in_row > training.config.train.skip_limit or autopsy.broken:
        recorder.event(
            "diverged",
            what=error.what,
            loss=error.loss,
            grad_norm=error.grad_norm,
            cause=autopsy.cause,
        )
        recorder.look()
        raise diverged(run, training, error, autopsy)


def stop_if_broken(run: Path, training: Training, recorder: Recorder) -> None:
    """Ends the run where weights or optimizer hold numbers that are lost.

    Called before each save: a checkpoint of them would, sooner or later, take the good ones' place.
    """
    broken = out_of_range(training)
    if broken:
        recorder.event("diverged", what="weights", where=broken, cause="rate")
        recorder.look()
        raise lost(run, training, broken)


def diverged(run: Path, training: Training, error: NonFiniteError, autopsy: Autopsy) -> UserError:
    """The end of a run whose numbers have broken: what, where, why, and what to type."""
    if autopsy.broken:
        return lost(run, training, autopsy.broken)
    config, progress = training.config, training.progress
    step, rate = progress.step + 1, training.optimizer.param_groups[0]["lr"]
    value = error.loss if error.what == "loss" else error.grad_norm
    kept, lower = ways_on(run, config)
    again = shlex.join(["gpt-train", "--config", str(run / "config.yaml")])
    where = f", first in {autopsy.where}" if autopsy.where else ""
    match autopsy.cause:
        case "rate":
            why, command = "most often the rate is too high", lower
        case "overflow":
            why = "the numbers are finite in fp32, fp16 overflows"
            command = f"{again} --train.dtype bf16 {shlex.join(under_new_name(config, 'bf16'))}"
        case "batch":
            why = "the weights are sound, this batch's gradient is not (a kernel, or its data)"
            if autopsy.rows:
                why = f"the weights are sound, sequences {list(autopsy.rows[:4])} of it are not"
            command = f"{again} --train.skip_limit {2 * config.train.skip_limit + 1}"
    return UserError(
        f"train: the {error.what} of step {step} is {value} (rate {rate:.2e}{where}), and "
        f"{progress.skips_in_row - 1} steps before it were skipped; stopped before the update, the "
        f"weights are finite. Cause: {why}; {kept}. Go on with: {command}"
    )


def lost(run: Path, training: Training, broken: str) -> UserError:
    """The end of a run whose weights or optimizer are lost."""
    step, rate = training.progress.step, training.optimizer.param_groups[0]["lr"]
    kept, lower = ways_on(run, training.config)
    return UserError(
        f"train: {broken} is not finite (or above {LOST_WEIGHT:g}) after step {step}, rate "
        f"{rate:.2e}; stopped, none of it was saved. Cause: an update beyond all use, most often "
        "because the rate is too high; "
        f"{kept}. Go on with: {lower}"
    )


def ways_on(run: Path, config: Config) -> tuple[str, str]:
    """What is left to go on from, in words, and the command that does so at a lower rate."""
    good = newest_checkpoint(run)
    words = ["gpt-train", "--config", str(run / "config.yaml")]
    words += rate_options(config, config.optimizer.lr / 3)
    if good is None:
        words += under_new_name(config, "lower-lr")
        return "there is no checkpoint yet", shlex.join(words)
    return f"the last good checkpoint is {good}", shlex.join([*words, "--rate", "override"])
