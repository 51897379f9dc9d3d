"""Rules about what happened at a step: broken numbers, spikes, the machine."""

from bisect import insort
from collections.abc import Iterator

import numpy as np

from gpt.config import Config
from gpt.health.advice import rate_command, train_command
from gpt.health.finding import Finding
from gpt.health.view import MAD_TO_SIGMA, View
from gpt.history import Column
from gpt.lr.rates import rate_options

SPIKE_SIGMAS = 6.0  # as in OLMo-core
SPIKE_ALONE = 2.0  # times that, where the line after it is as before
SPIKE_WINDOW = 24  # lines
SPIKE_NATS = 0.25  # and so far above, in nats: what is less does no harm worth a line
SLOW_SHARE = 0.45  # of the usual speed
SLOW_LINES = 4
BUSY_SHARE = 0.25  # of all cores, taken by others
FAULTS_A_LINE = 100

CAUSES = {
    "rate": "the weights have left where the model works: most often the rate is too high",
    "overflow": "finite in fp32: fp16 overflows here",
    "batch": "the model is sound before and after: this batch, or a kernel on it, is not",
}


def nonfinite(view: View) -> Iterator[Finding]:
    """Loss or gradient that is not a number, and why, as the step's own autopsy says."""
    history = view.history
    events = [e for e in history.events if e.get("event") in ("nonfinite", "diverged")]
    if events:
        first, last = events[0], events[-1]
        count = sum(e["event"] == "nonfinite" for e in events)
        cause = str(last.get("cause") or first.get("cause") or "rate")
        step = int(first["step"]) + 1
        where = f", first in {first['where']}" if first.get("where") else ""
        batch = f", batch {first['batch']}" if "batch" in first else ""
        rows = f", sequences {first['rows']}" if first.get("rows") else ""
        value = first.get("loss") if first.get("what") == "loss" else first.get("grad_norm")
        if first.get("what") == "weights":  # found when they were to be saved
            value = "not finite"
        stopped = any(e["event"] == "diverged" for e in events)
        yield Finding(
            id="nonfinite",
            first_step=step,
            last_step=None if stopped else int(last["step"]) + 1,
            evidence=f"{first.get('what', 'loss')} {value} at step {step:,}{batch}{rows}{where}; "
            f"{count} steps skipped" + (", then the run stopped" if stopped else ""),
            cause=CAUSES.get(cause, cause),
            next=_after_nonfinite(view, cause, stopped=stopped),
            numbers={"skipped": count},
        )
        return
    for table, name in ((history.train, "loss"), (history.evals, "val_loss")):
        broken = ~np.isfinite(table[name])
        if name not in table.columns or not broken.any():
            continue
        step = int(table["step"][broken][0])
        after = int(broken.sum())
        yield Finding(
            id="nonfinite",
            first_step=step,
            evidence=f"{name} is not finite from step {step:,} on, in {after} of "
            f"{len(broken)} lines; " + _before(view, step),
            cause=f"{CAUSES['rate']}; in fp16 an overflow looks the same",
            next=rate_command(history, 1 / 3),
            numbers={"lines": after},
        )
        return


def _before(view: View, step: float) -> str:
    """How the loss stood before a step."""
    earlier = view.steps < step
    if not earlier.any():
        return "no finite loss before it"
    losses = view.loss[earlier]
    return f"lowest {losses.min():.3f}, last {losses[-1]:.3f} before it"


def _after_nonfinite(view: View, cause: str, *, stopped: bool) -> str:
    history, config = view.history, view.history.config
    if cause == "overflow":
        return train_command(history, "--train.dtype bf16", name="bf16") or "the same run in bf16"
    if cause == "batch" and not stopped:
        return "nothing, if it does not come back: the batch was passed over"
    if cause == "batch":
        if config is None:
            return "the same run with a larger train.skip_limit, which passes over more batches"
        more = train_command(history, f"--train.skip_limit {2 * config.train.skip_limit + 1}")
        return f"{more} # passes over more batches in a row"
    if config is not None and history.last_step >= config.checkpoint.every_steps:
        return train_command(
            history, "--rate override", *rate_options(config, config.optimizer.lr / 3)
        )
    return rate_command(history, 1 / 3)


def spike(view: View) -> Iterator[Finding]:
    """A loss far above those just before it, and whether it came back."""
    loss, steps = view.loss, view.steps
    raised = view.column("loss_max")
    values = np.where(np.isfinite(raised), raised, loss)
    hits = [
        index
        for index in _jumps(loss, view.sigma)
        if steps[index] > view.warmup_end + 0.05 * view.total
    ]
    if not hits:
        return
    first, worst = hits[0], max(hits, key=lambda index: values[index])
    level = float(np.median(loss[max(0, first - 16) : first]))
    after = loss[worst + 1 :]
    back = np.flatnonzero(after <= level + 2 * view.sigma)
    recovered = int(steps[worst + 1 + back[0]]) if back.size else None
    far = f"back at its level by step {recovered:,}" if recovered else "not back at its level yet"
    ratio = view.column("grad_norm_max")[worst]
    norm = f", gradient norm up to {ratio:.3g}" if np.isfinite(ratio) else ""
    yield Finding(
        id="spike",
        first_step=int(steps[first]),
        last_step=recovered,
        evidence=f"the loss jumps from {level:.3f} to {values[worst]:.3f} at step "
        f"{int(steps[worst]):,}, {(values[worst] - level) / max(view.sigma, 1e-9):.0f} times its "
        f"noise{norm}; {far}",
        cause="a batch unlike the others, or a rate at the edge of what the model bears",
        next=train_command(view.history, *_guard(view.history.config), name="guarded")
        or "look at the batch of that step; clip the gradient, or lower the rate if it comes again",
        numbers={"height": float(values[worst] - level), "level": level},
    )


def _guard(config: Config | None) -> list[str]:
    """What turns on the guard that skips such steps; it needs leave to skip any."""
    skips = config is None or config.train.skip_limit
    return ["--train.spike_sigma 6", *([] if skips else ["--train.skip_limit 5"])]


def _jumps(loss: Column, sigma: float) -> list[int]:
    """Lines far above the median of those before them: one by a lot, or two in a row."""
    heights = np.full(len(loss), -np.inf)
    if len(loss) > SPIKE_WINDOW:
        before = np.lib.stride_tricks.sliding_window_view(loss[:-1], SPIKE_WINDOW)
        level = np.median(before, axis=1)
        spread = MAD_TO_SIGMA * np.median(np.abs(before - level[:, None]), axis=1)
        height = loss[SPIKE_WINDOW:] - level
        scaled = height / np.maximum(spread, sigma)
        heights[SPIKE_WINDOW:] = np.where(height > SPIKE_NATS, scaled, -np.inf)
    follows = np.append(heights[1:], -np.inf)
    alone = heights > SPIKE_ALONE * SPIKE_SIGMAS
    jumps = alone | ((heights > SPIKE_SIGMAS) & (follows > SPIKE_SIGMAS / 2))
    return [int(index) for index in np.flatnonzero(jumps)]


def throughput(view: View) -> Iterator[Finding]:
    """A speed that falls and stays low, and what the machine did meanwhile."""
    speed = view.column("tokens_per_s")
    if not np.isfinite(speed).any():
        seconds = view.column("step_time_s")
        speed = 1 / seconds
    known = np.isfinite(speed) & (view.steps > view.steps[0] if len(speed) else False)
    if known.sum() < 4 * SLOW_LINES:
        return
    values, steps = speed[known], view.steps[known]
    if len(values) > 60:  # lines that are short take the noise of one moment
        width = len(values) // 60
        cut = len(values) // width * width
        values = np.median(values[:cut].reshape(-1, width), axis=1)
        steps = steps[:cut:width]
    usual = _medians_before(values)
    slow = values < SLOW_SHARE * usual
    slow[: 2 * SLOW_LINES] = False
    run, found = 0, None
    for index, is_slow in enumerate(slow):
        run = run + 1 if is_slow else 0
        if run == SLOW_LINES:
            found = index - SLOW_LINES + 1
            break
    if found is None:
        return
    step, before = int(steps[found]), float(usual[found])
    later = values[found:]
    slow_later = later < SLOW_SHARE * before
    over = None if slow_later[-SLOW_LINES:].any() else int(steps[found:][slow_later][-1])
    now = float(np.median(later[slow_later]))
    cause, numbers = _machine(view, step, over)
    unit = "tokens/s" if "tokens_per_s" in view.history.train else "steps/s"
    yield Finding(
        id="throughput",
        first_step=step,
        last_step=over,
        evidence=f"{_speed(now)} {unit} from step {step:,} on, {_speed(before)} before"
        + (f"; over at step {over:,}" if over else ""),
        cause=cause,
        next="top # or nvidia-smi: what else runs on the machine?",
        numbers={"before": before, "now": now, **numbers},
    )


def _speed(value: float) -> str:
    """A speed in three digits, or in all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _medians_before(values: Column) -> Column:
    """The median of all values before each; the first has none, and is its own."""
    known: list[float] = []
    medians: list[float] = []
    for value in values.tolist():
        count = len(known)
        medians.append((known[(count - 1) // 2] + known[count // 2]) / 2 if count else value)
        insort(known, value)
    return np.array(medians)


def _machine(view: View, step: int, over: int | None) -> tuple[str, dict[str, float]]:
    """What the machine did while it was slow, against before."""
    during = (view.steps >= step) & (view.steps <= (over or view.last))
    before = (view.steps < step) & (view.steps > view.steps[0])
    numbers: dict[str, float] = {}
    for name in ("others_share", "cpu_share", "major_faults"):
        for key, rows in (("before", before), ("during", during)):
            value = view.middle(name, rows)
            if value is not None:
                numbers[f"{name}_{key}"] = value
    others = numbers.get("others_share_during", 0) - numbers.get("others_share_before", 0)
    own = numbers.get("cpu_share_before", 1.0) - numbers.get("cpu_share_during", 1.0)
    if numbers.get("major_faults_during", 0) > FAULTS_A_LINE:
        return (
            f"the machine swaps: {numbers['major_faults_during']:.0f} pages a line come from disk",
            numbers,
        )
    if others > BUSY_SHARE or own > BUSY_SHARE:
        share = 100 * numbers.get("others_share_during", 0)
        return f"other processes take {share:.0f} % of the cores", numbers
    return "slower cores (heat, power saving), a slow disk, or a busy accelerator", numbers
