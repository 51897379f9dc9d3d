"""A step whose numbers are not finite: passed over, or the end of the run, with what to type."""

from pathlib import Path

from torch import Tensor

from gpt.autopsy import Autopsy, examine
from gpt.checkpoint import Training
from gpt.errors import UserError
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
    """Passes over a batch whose loss or gradient is not finite; ends the run after too many."""
    progress = training.progress
    autopsy = examine(training, *batch)
    recorder.skipped_batch(
        "nonfinite",
        what=error.what,
        loss=error.loss,
        grad_norm=error.grad_norm,
        batch=progress.step + progress.skipped_batches,
        **autopsy.record(),
    )
    if progress.skips_in_row > training.config.train.skip_limit:
        recorder.event(
            "diverged",
            what=error.what,
            loss=error.loss,
            grad_norm=error.grad_norm,
            cause=autopsy.cause,
        )
        recorder.look()
        raise diverged(run, training, error, autopsy)


def diverged(run: Path, training: Training, error: NonFiniteError, autopsy: Autopsy) -> UserError:
    """The end of a run whose numbers have broken: what, where, why, and what to type."""
    config, progress = training.config, training.progress
    step, rate = progress.step + 1, training.optimizer.param_groups[0]["lr"]
    value = error.loss if error.what == "loss" else error.grad_norm
    good = newest_checkpoint(run)
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    again = f"gpt-train --config {run / 'config.yaml'}"
    lower = f"{again} --optimizer.lr {config.optimizer.lr / 3:.1e}"
    lower += " --rate override" if good else f" --run.name {config.run.name}-lower-lr"
    where = f", first in {autopsy.where}" if autopsy.where else ""
    match autopsy.cause:
        case "rate":
            why, command = "most often the rate is too high", lower
        case "overflow":
            why = "the numbers are finite in fp32, fp16 overflows"
            command = f"{again} --train.dtype bf16 --run.name {config.run.name}-bf16"
        case "batch":
            why = "the weights are sound, this batch's gradient is not (a kernel, or its data)"
            if autopsy.rows:
                why = f"the weights are sound, sequences {list(autopsy.rows[:4])} of it are not"
            command = f"{again} --train.skip_limit {2 * config.train.skip_limit + 1}"
    return UserError(
        f"train: the {error.what} of step {step} is {value} (rate {rate:.2e}{where}), as it was in "
        f"{progress.skips_in_row - 1} steps before it; stopped before the update, the weights are "
        f"finite. Cause: {why}; {kept}. Go on with: {command}"
    )
