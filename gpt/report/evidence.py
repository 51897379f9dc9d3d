"""What the branches of a run showed, in numbers that its limit can be told from."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpt.history import History, finite
from gpt.report.branches import Bench, Branch, Difference, Losses, drop, mean_loss

# What another order of the batches changes, as a share of the cooldown's gain and over the root of
# the steps. Measured on small runs: docs/probes.md, under `What ± means`.
ORDER_NOISE = {"gain": 1.3, "win": 0.5}


@dataclass(frozen=True)
class Evidence:
    """What was measured. Losses are nats per token; differences are above 0 for what is better.

    Attributes:
        steps: steps of each branch.
        step: steps that the run had done.
        total_steps: steps that it is planned to do.
        rate_share: the rate as a share of its peak.
        optimizer: its name.
        val: the checkpoint's validation loss.
        drift: what going on at the unchanged rate gained over the checkpoint.
        total: what cooling down to 0 gained over the checkpoint.
        gain: what cooling down gained over going on, after as many steps.
        noise_share: the share of `total` that is less noise, by `share_of_noise`.
        win: what cooling down from twice the rate gained over cooling down from the rate; minus
            infinity where it broke, None where it was not tried.
        train_win: the same of the training losses, paired over the second half of the steps.
        gap: the validation loss above the training loss, less what lay between them in the first
            pass over the text.
        epochs: passes over the text that the run had made.
        rise: how far the validation loss is above the lowest in the run's log; None: unknown.
        fall: the share by which it fell over the last quarter of the run; None: unknown.
    """

    steps: int
    step: int
    total_steps: int
    rate_share: float
    optimizer: str
    val: float
    drift: Difference
    total: Difference
    gain: Difference
    noise_share: float
    win: Difference | None
    train_win: Difference | None
    gap: Difference
    epochs: float
    rise: float | None = None
    fall: float | None = None


def share_of_noise(control: Sequence[float], cooled: Sequence[float], total: Difference) -> float:
    """How much of a cooldown's gain is less noise, by the training losses; nan without a gain.

    That is the cooled branch's loss below that of the unchanged rate, on the same batches, over
    the second half of the steps. It wavers half as much as the validation losses at the end do,
    since it is a mean over many states of the unchanged branch. Above 1 where the loss would have
    risen, below 0 where slower steps learned less.
    """
    if not total.value > 0:
        return math.nan
    return paired(control, cooled).value / total.value


def paired(above: Sequence[float], below: Sequence[float]) -> Difference:
    """How far one training loss is below another on the same batches, in the second half."""
    pairs = list(zip(above, below, strict=True))[len(above) // 2 :]
    falls = [one - other for one, other in pairs]
    return Difference(statistics.fmean(falls), statistics.stdev(falls) / math.sqrt(len(falls)))


def order_noise(what: Literal["gain", "win"], total: Difference, steps: int) -> float:
    """The standard error, in nats, that the order of the batches gives to a difference."""
    return ORDER_NOISE[what] * abs(total.value) / math.sqrt(steps)


def evidence_of(
    bench: Bench, steps: int, before: Losses, branches: dict[str, Branch], history: History
) -> Evidence | None:
    """The branches in numbers; None where one that is not at twice the rate has broken."""
    control, cooled, double = branches["control"], branches["cooled"], branches.get("double")
    if control.val is None or cooled.val is None:
        return None
    total = drop(before, cooled.val)
    gain = drop(control.val, cooled.val).with_noise(order_noise("gain", total, steps))
    win = train_win = None
    if double is not None and double.val is None:
        win = Difference(-math.inf, math.inf)
    elif double is not None and double.val is not None:
        win = drop(cooled.val, double.val).with_noise(order_noise("win", total, steps))
        train_win = paired(cooled.losses, double.losses)
    lowest, earlier = _past_losses(history, bench.step)
    return Evidence(
        steps=steps,
        step=bench.step,
        total_steps=bench.plan.total_steps,
        rate_share=bench.plan.factor(bench.step),
        optimizer=bench.config.optimizer.name,
        val=before.mean,
        drift=drop(before, control.val),
        total=total,
        gain=gain,
        noise_share=share_of_noise(control.losses, cooled.losses, total),
        win=win,
        train_win=train_win,
        gap=_gap(before, control.losses, _first_gap(history)),
        epochs=bench.epochs,
        rise=None if lowest is None else before.mean - lowest,
        fall=None if earlier is None else 1 - before.mean / earlier,
    )


def _gap(before: Losses, losses: Sequence[float], known: float) -> Difference:
    """The validation loss above the training loss of the same moment, less what is `known`."""
    val = mean_loss(before)
    noise = statistics.stdev(losses) / math.sqrt(len(losses))
    return Difference(val.value - statistics.fmean(losses) - known, val.error).with_noise(noise)


def _first_gap(history: History) -> float:
    """What lay between both losses when no text had been seen twice: the texts differ by it.

    0 where nothing was measured then, or the validation text was the easier one.
    """
    train, evals = history.train, history.evals
    first = train["step"][train["epoch"] <= 1]
    if not len(first) or not len(evals):
        return 0.0
    seen = evals["step"] <= first[-1]
    if not seen.any():
        return 0.0
    at, val = evals["step"][seen][-1], evals["val_loss"][seen][-1]
    near = (train["step"] > 0.8 * at) & (train["step"] <= at)
    gap = float(val - train["loss"][near].mean()) if near.any() else 0.0
    return max(0.0, gap) if math.isfinite(gap) else 0.0


def _past_losses(history: History, step: int) -> tuple[float | None, float | None]:
    """The lowest validation loss in the log, and the one at three quarters of the steps."""
    steps, losses = finite(history.evals["step"], history.evals["val_loss"])
    then = losses[(steps >= step / 2) & (steps <= 0.75 * step)]
    lowest = float(losses.min()) if len(losses) else None
    return lowest, float(then[-1]) if len(then) else None
