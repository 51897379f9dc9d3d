"""What a run tells while it goes: metrics.jsonl, the console, and the clock behind both."""

import math
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt.checkpoint import Progress, Training
from gpt.data import TokenData
from gpt.datacheck import check_data
from gpt.gauges import Gauge, NoiseMeter, inspect
from gpt.health.watch import Watch
from gpt.machine import MachineMeter
from gpt.metrics import Console, MetricsLog, Record, each_record
from gpt.model import count_parameters
from gpt.pace import HangWatch, SlowSteps
from gpt.step import Evaluation, StepResult

LAYER_LINES = 50  # in a whole run, about
FINDING_KEYS = ("id", "first_step", "last_step", "evidence", "cause", "next", "numbers")


class Recorder:
    """Writes a run's steps, evaluations and events; keeps its clock. Used as a context manager.

    It also says what of the next step is measured, and looks at how the run is doing.
    """

    def __init__(self, run: Path, training: Training, total_steps: int, title: str = "") -> None:
        """Opens the run's log for appending; a resumed run's must have been cut first."""
        self._training = training
        self._total_steps = total_steps
        log = training.config.log
        self._every = log.every_steps
        self._layers_every = self._every * max(1, round(total_steps / LAYER_LINES / self._every))
        self._log = MetricsLog(
            run, tensorboard=log.tensorboard, wandb=log.wandb, config=training.config
        )
        self._console = Console(total_steps, start_step=training.progress.step, title=title)
        self._noise = NoiseMeter()
        self._watch = Watch(run.name, training.config, total_steps, self._before(run))
        self.gauge = Gauge(training.model, training.optimizer)
        device = next(training.model.parameters()).device
        self._machine = MachineMeter(device)
        self._mark = time.perf_counter()
        self._interval_s, self._interval_tokens = 0.0, 0
        self._slow = SlowSteps()
        self._hang = HangWatch(self.line)
        self._is_one_of_many = bool(title)
        self._rates: list[float] = []

    def _before(self, run: Path) -> Iterator[Record]:
        """What an earlier process of the run has written, one by one; the noise goes on from it."""
        for record in each_record(run):
            signal, noise = record.get("grad_signal"), record.get("grad_noise")
            if isinstance(signal, float) and isinstance(noise, float):  # a damaged line may lack it
                self._noise.add(signal, noise)
            yield record

    def begin(self, data: TokenData) -> None:
        """Records what the run is, and what is known of its text before the first step."""
        training = self._training
        device = next(training.model.parameters()).device
        self.event(
            "run",
            total_steps=self._total_steps,
            vocab_size=training.tokenizer.vocab_size,
            parameters=count_parameters(training.model),
            train_tokens=data.train.n_tokens,
            tokens_per_step=training.config.tokens_per_step,
            device=str(device),
            dtype=str(training.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
            python=platform.python_version(),
            platform=platform.platform(),
        )
        if training.progress.step == 0:
            self.event("data_check", **check_data(data).record())
        self._look(now=True)

    def is_logged(self, step: int) -> bool:
        """Whether the step with this number, counted from 1, gets a line."""
        return step == 1 or step % self._every == 0 or step == self._total_steps

    def before_step(self) -> None:
        """Tells the gauge what of the next step is wanted."""
        step = self._training.progress.step + 1
        self._rates = [float(group["lr"]) for group in self._training.optimizer.param_groups]
        self.gauge.watch(full=self.is_logged(step), first=self.is_logged(step + 1))

    def tick(self) -> float:
        """Adds the time since the last tick to the run's clock; returns it in seconds."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._hang.begin(self._training.progress.step + 1, self._slow.usual_s)
        self._training.progress.seconds += passed
        return passed

    def step(self, result: StepResult, inputs: Tensor, epoch: float, seconds: float) -> None:
        """Records a completed step that learned from `inputs` (B, T) in `seconds`."""
        progress = self._training.progress
        self._hang.end()
        self._interval_s += seconds
        self._interval_tokens += inputs.numel()
        if warning := self._slow.add(seconds, progress.step):
            self.event("slow_step", seconds=round(seconds, 3))
            self.line(f"warning: {warning}")
        interval = note_step(progress, result)
        logged = self.is_logged(progress.step)
        record: dict[str, object] = {
            "kind": "train",
            "step": progress.step,
            "tokens": progress.tokens,
            "epoch": round(epoch, 6),
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "clipped": result.clipped,
            "tokens_per_s": round(self._interval_tokens / self._interval_s, 1),
            "time_s": round(progress.seconds, 3),
        }
        left = (self._total_steps - progress.step) * progress.seconds / progress.step
        self._console.step(record, log=logged, left_s=left)
        if logged:
            self._write(record | self._signals(interval, inputs.numel()))
            if progress.step % self._layers_every == 0:
                self._layers(inputs)
            progress.interval = {}
            self._interval_s, self._interval_tokens = 0.0, 0
            self._look()

    def _signals(self, interval: dict[str, float], tokens: int) -> dict[str, object]:
        """What a logged step tells beside the contract's first fields."""
        moves, pair = self.gauge.moves, self.gauge.pair
        if pair is not None:
            self._noise.add(pair.signal, pair.noise)
        steps = interval["steps"]
        groups = self._training.optimizer.param_groups
        rates = self._rates
        return {
            "update_ratio": None if moves is None else moves.update_ratio,
            "lrs": dict(zip((group["name"] for group in groups), rates, strict=True)),
            "loss_mean": interval["loss"] / steps,
            "loss_max": interval["loss_max"],
            "grad_norm_max": interval["norm_max"],
            "clipped_share": round(interval["clipped"] / steps, 4),
            "skipped": int(interval.get("skipped", 0)),
            "adam_rms": None if moves is None else moves.adam_rms,
            "slope_before": None if pair is None else pair.slope_before,
            "slope_after": None if pair is None else pair.slope_after,
            "grad_signal": None if pair is None else pair.signal,
            "grad_noise": None if pair is None else pair.noise,
            "noise_scale": self._noise.scale(tokens),
            **self._machine.read(),
        }

    def _layers(self, inputs: Tensor) -> None:
        """A line of what goes on layer by layer."""
        moves, model = self.gauge.moves, self._training.model
        if moves is None:
            return
        device = next(model.parameters()).device
        self._write(
            {
                "kind": "layers",
                "step": self._training.progress.step,
                "update_ratio": moves.by_parameter,
                "grad_norm": moves.grad_norms,
                **inspect(model, inputs.to(device)),
            }
        )

    def _look(self, *, now: bool = False) -> None:
        """Tells findings that begin or end."""
        for finding, begins in self._watch.look(self._training.progress.step, now=now):
            values = {key: getattr(finding, key) for key in FINDING_KEYS}
            self.event("finding", state="begin" if begins else "end", **values)
            if self._is_one_of_many:
                continue  # a sweep goes to rates that are wrong on purpose
            if begins:
                self.line(f"warning: {finding.id}: {finding.evidence}; {finding.cause}")
                self.line(f"  → {finding.next}")
            else:
                self.line(f"over     {finding.id}: no longer so")

    def evaluation(self, result: Evaluation, train_loss: float | None, is_best: bool) -> None:
        """Records an evaluation; `train_loss` is the mean over the steps since the one before."""
        progress = self._training.progress
        self._write(
            {
                "kind": "eval",
                "step": progress.step,
                "val_loss": result.loss,
                "val_bpb": result.bits_per_byte,
                "train_loss": train_loss,
                "val_se": result.standard_error,
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
        self._look(now=True)

    def event(self, name: str, **values: object) -> None:
        """Records something that happened at this point of the run."""
        self._hang.end()
        details: Mapping[str, object] = {"event": name, **values}
        self._write({"kind": "event", "step": self._training.progress.step, **details})

    def skipped_batch(self, name: str, **values: object) -> None:
        """Records a batch that was passed over, and counts it."""
        progress = self._training.progress
        self.event(name, batch=progress.next_batch, **values)
        progress.skipped_batches += 1
        progress.skips_in_row += 1
        progress.interval["skipped"] = progress.interval.get("skipped", 0) + 1
        self.tick()
        self._hang.end()

    def look(self) -> None:
        """Looks at how the run is doing, whether it is time to or not."""
        self._look(now=True)

    def end(self, how: str) -> None:
        """Records how this process ended."""
        self.event("end", how=how)
        self._look(now=True)

    def _write(self, record: Mapping[str, object]) -> None:
        self._log.write(record)
        self._watch.add(record)

    def line(self, text: str) -> None:
        """Prints a line for people, above the bar if there is one."""
        self._console.line(text)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._hang.close()
        self._console.close()
        self._log.close(failed=kind is not None)


def note_step(progress: Progress, result: StepResult) -> dict[str, float]:
    """Books a step that was taken into the interval since the log's last line; returns that."""
    interval = progress.interval
    interval["steps"] = interval.get("steps", 0) + 1
    interval["loss"] = interval.get("loss", 0.0) + result.loss
    interval["clipped"] = interval.get("clipped", 0) + result.clipped
    interval["loss_max"] = max(interval.get("loss_max", -math.inf), result.loss)
    interval["norm_max"] = max(interval.get("norm_max", 0.0), result.grad_norm)
    return interval


def note_evaluation(progress: Progress, result: Evaluation) -> float | None:
    """Books an evaluation: best, patience; returns the mean training loss since the one before."""
    progress.evaluated_step = progress.step
    better = progress.best_val_loss is None or result.loss < progress.best_val_loss
    if better and math.isfinite(result.loss):
        progress.best_step, progress.best_val_loss = progress.step, result.loss
        progress.evals_since_best = 0
    else:
        progress.evals_since_best += 1
    steps, total = progress.train_loss_steps, progress.train_loss_sum
    progress.train_loss_sum, progress.train_loss_steps = 0.0, 0
    return total / steps if steps else None
