"""What a run tells while it goes: metrics.jsonl, the console, and the clock behind both."""

import time
from collections.abc import Mapping
from pathlib import Path

from gpt.checkpoint import Progress, Training
from gpt.metrics import Console, MetricsLog
from gpt.step import Evaluation, StepResult


class Recorder:
    """Writes a run's steps, evaluations and events; keeps its clock. Used as a context manager."""

    def __init__(self, run: Path, training: Training, total_steps: int, title: str = "") -> None:
        """Opens the run's log for appending; a resumed run's must have been cut first."""
        self._training = training
        self._total_steps = total_steps
        self._every = training.config.log.every_steps
        log = training.config.log
        self._log = MetricsLog(
            run, tensorboard=log.tensorboard, wandb=log.wandb, config=training.config
        )
        self._console = Console(total_steps, start_step=training.progress.step, title=title)
        self._mark = time.perf_counter()
        self._interval_s, self._interval_tokens = 0.0, 0

    def is_logged(self, step: int) -> bool:
        """Whether the step with this number, counted from 1, gets a line."""
        return step == 1 or step % self._every == 0 or step == self._total_steps

    def tick(self) -> float:
        """Adds the time since the last tick to the run's clock; returns it in seconds."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._training.progress.seconds += passed
        return passed

    def step(self, result: StepResult, tokens: int, epoch: float, seconds: float) -> None:
        """Records a completed step that learned from `tokens` in `seconds`."""
        progress = self._training.progress
        self._interval_s += seconds
        self._interval_tokens += tokens
        speed = self._interval_tokens / self._interval_s
        record = {
            "kind": "train",
            "step": progress.step,
            "tokens": progress.tokens,
            "epoch": round(epoch, 6),
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "clipped": result.clipped,
            "update_ratio": result.update_ratio,
            "tokens_per_s": round(speed, 1),
            "time_s": round(progress.seconds, 3),
        }
        left = (self._total_steps - progress.step) * progress.seconds / progress.step
        logged = self.is_logged(progress.step)
        self._console.step(record, log=logged, left_s=left)
        if logged:
            self._log.write(record)
            self._interval_s, self._interval_tokens = 0.0, 0

    def evaluation(self, result: Evaluation, train_loss: float | None, is_best: bool) -> None:
        """Records an evaluation; `train_loss` is the mean over the steps since the one before."""
        progress = self._training.progress
        self._log.write(
            {
                "kind": "eval",
                "step": progress.step,
                "val_loss": result.loss,
                "val_bpb": result.bits_per_byte,
                "train_loss": train_loss,
                "val_tokens": result.tokens,
                "time_s": round(progress.seconds, 3),
            }
        )
        self.line(
            f"eval {progress.step}/{self._total_steps}  val loss {result.loss:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte"
            + (f"  train loss {train_loss:.4f}" if train_loss is not None else "")
            + ("  (best so far)" if is_best else "")
        )

    def event(self, name: str, **values: object) -> None:
        """Records something that happened at this point of the run."""
        details: Mapping[str, object] = {"event": name, **values}
        self._log.write({"kind": "event", "step": self._training.progress.step, **details})

    def line(self, text: str) -> None:
        """Prints a line for people, above the bar if there is one."""
        self._console.line(text)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._console.close()
        self._log.close()


def note_evaluation(progress: Progress, result: Evaluation) -> float | None:
    """Books an evaluation: best, patience; returns the mean training loss since the one before."""
    progress.evaluated_step = progress.step
    if progress.best_val_loss is None or result.loss < progress.best_val_loss:
        progress.best_step, progress.best_val_loss = progress.step, result.loss
        progress.evals_since_best = 0
    else:
        progress.evals_since_best += 1
    steps, total = progress.train_loss_steps, progress.train_loss_sum
    progress.train_loss_sum, progress.train_loss_steps = 0.0, 0
    return total / steps if steps else None
