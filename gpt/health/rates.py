"""Rules about the rate: too small, too large, badly warmed up, never lowered.

The strongest of the signals is `overshoot`: how much of the loss's slope along an update is left
where the update ends. A step so short that the slope has not changed (1) could have been longer;
at a good rate noise and curvature have used it up (0); below, steps go too far.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt.config import Config
from gpt.health.advice import find_command, probe_command, rate_command, train_command
from gpt.health.finding import Finding
from gpt.health.view import AT_CHANCE, PEAK_SHARE, View, half_widths, is_a_guess, theil_sen
from gpt.history import Column, Rows

SHORT_STEP = 0.6  # slope left behind a step: healthy runs 0.6 in their first tenth, then below 0.4
SHORT_STEP_HARDLY = 0.2  # the same where a step hardly moves the weights: noise hides the slope
SHORT_UPDATE = 3e-3  # above it a step is not short, whatever is left of the slope
SMALL_UPDATE = 1e-4  # update over weights a step, of healthy runs 1e-3 to 2e-2
LONG_STEP = -0.8
LEAST_PAIRS = 5
BEGUN = 0.02  # of the steps: a log that begins later does not tell what the first ones did
FLAT_SHARE = 0.01  # of the way to 0 that a loss has fallen
KNOWS_NOTHING = 0.9  # times the unigram entropy
RISE_SIGMAS = 6.0
RISE_SHARE = 0.1  # of the whole fall
FAST_UPDATE = 0.05  # update over weights a step; healthy runs stay below 0.02
# Source: the lint's ranges (gpt.lr.recipes), widened threefold.
USUAL_RATES = {
    "sgd": (1e-3, 10.0),
    "adam": (1e-5, 0.05),
    "adamw": (1e-5, 0.05),
    "muon": (1e-4, 0.2),
    "adafactor": (1e-4, 0.3),
}
SHORT_WARMUP = 0.02  # of the run
NO_WARMUP, NO_WARMUP_SIGMAS = 3, 4.5  # so few steps are none, and less of a jump is enough
EARLY = 0.08
EARLY_JUMP = 0.1
CHANCE_SHARE = 1.5  # of the highest of so many draws from a normal distribution
EARLY_NATS = 0.12
SOON_BACK = 0.15  # of the run: what takes longer to come back is no matter of the warmup
LATE_BACK = 0.5  # the same where the log shows that the rate was full at once
EARLY_NOISE = 0.3  # of what is known: the noise of single steps is judged after it
LAST_LINES = 3
LEVEL = 0.98  # of the peak: a rate that has not begun to come down
UNDECAYED = 0.5  # of the peak, at the end of a run
LATE = 0.82  # share of the run by which a decay should have begun


class Slope(NamedTuple):
    """Share of the slope that is left behind a step, its standard error, and of how many."""

    left: float
    error: float
    pairs: int


def slope_left(view: View, rows: Rows) -> Slope | None:
    """Over some rows, sums before the ratio; None where too little was measured."""
    before, after = view.column("slope_before")[rows], view.column("slope_after")[rows]
    known = np.isfinite(before) & np.isfinite(after)
    before, after = before[known], after[known]
    if len(before) < LEAST_PAIRS or before.sum() >= 0:
        return None
    ratio = float(after.sum() / before.sum())
    residuals = after - ratio * before
    error = float(residuals.std(ddof=1) * math.sqrt(len(before)) / abs(before.sum()))
    return Slope(ratio, error, len(before))


def recent_peak(view: View) -> Rows:
    """Settled rows at the full rate, the later half of them."""
    rows = view.at_peak
    count = int(rows.sum())
    if count > 2 * LEAST_PAIRS:
        rows = rows & (np.cumsum(rows) > count // 2)
    return rows


def lr_too_small(view: View) -> Iterator[Finding]:
    """Steps that could all have been longer, while the loss has far to go."""
    if view.last < view.warmup_end + max(20.0, 0.08 * view.total):
        return
    rows = recent_peak(view)
    slope = slope_left(view, rows)
    if slope is not None:
        ratio = view.middle("update_ratio", rows)
        hardly_moves = ratio is not None and ratio < SMALL_UPDATE
        if ratio is not None and ratio > SHORT_UPDATE:
            return
        least = SHORT_STEP if not hardly_moves else SHORT_STEP_HARDLY
        if slope.left - 2 * slope.error < least or _knows_a_lot(view):
            return
        fall = view.start_loss - float(view.smooth[-1])
        yield Finding(
            id="lr_too_small",
            first_step=int(view.warmup_end),
            evidence=f"behind each step {100 * slope.left:.0f} % of the loss's slope is left (a "
            f"good rate leaves -30 to 30 %), over {slope.pairs} measured steps; the loss fell by "
            f"{fall:.3f} nats in {int(view.last):,} steps"
            + (f"; a step moves the weights by {ratio:.1e} of their size" if ratio else ""),
            cause="the steps are too short: the rate is too small",
            next=_larger(view),
            numbers={"slope_left": slope.left, "pairs": slope.pairs, "fall": fall},
        )
        return
    if view.column("slope_before")[np.isfinite(view.column("slope_before"))].size:
        return  # measured, but not yet enough of it
    yield from _too_slow_by_the_curve(view)


def _knows_a_lot(view: View) -> bool:
    """Whether the loss is so low already that short steps may be all that is wanted."""
    low = view.ignorance
    return low is not None and float(view.smooth[-1]) < 0.5 * low


def _larger(view: View) -> str:
    return find_command(view.history) if view.history.config else rate_command(view.history, 10)


def _too_slow_by_the_curve(view: View) -> Iterator[Finding]:
    """For logs that hold little more than a loss: it stays flat, or falls in a straight line."""
    count = len(view.smooth)
    enough = count >= 20 and view.last >= 100
    begun_late = enough and view.steps[0] > BEGUN * view.last
    if not enough or begun_late or view.progress < (0.1 if view.history.finished else 0.2):
        return
    start, end = float(view.smooth[0]), float(view.smooth[-1])
    fall, rate = start - end, view.planned_peak
    quarter = start - float(view.smooth[count // 4])
    flat = abs(fall) < FLAT_SHARE * start and abs(quarter) < FLAT_SHARE * start
    slope, _, high = theil_sen(view.steps, view.loss)
    if flat:
        tiny = rate is not None and rate < 1e-5
        level, chance = float(np.median(view.loss)), view.history.chance
        guess = is_a_guess(level) if chance is None else abs(level - chance) < AT_CHANCE * chance
        if not tiny and guess:
            return  # stuck_at_chance says more
        how = f"the loss is as flat as it began: {start:.3f} to {end:.3f}"
    elif high < 0 and fall < 0.2 * start and _is_straight(view, fall, quarter):
        share = 100 * quarter / fall
        how = f"the loss falls from {start:.3f} to {end:.3f} nearly in a straight line "
        how += f"({share:.0f} % of it in the first quarter, a sound run does most of it there)"
    else:
        return
    yield Finding(
        id="lr_too_small",
        first_step=int(view.steps[0]),
        evidence=f"{how}, in {int(view.last):,} steps" + (f" at {rate:.1e}" if rate else ""),
        cause="the rate is too small (or zero)",
        next=_larger(view),
        numbers={"fall": fall, "slope": slope},
    )


def _is_straight(view: View, fall: float, quarter: float) -> bool:
    """Whether a quarter of the steps brought about a quarter of the fall."""
    if fall <= 0:
        return False
    rates = view.lr
    decayed = bool(np.isfinite(rates).any()) and rates[-1] < UNDECAYED * np.nanmax(rates)
    late = float(view.smooth[len(view.smooth) // 2] - view.smooth[-1])
    return quarter < (0.6 if decayed else 0.45) * fall and (late > 0.2 * fall or decayed)


def lr_too_large(view: View) -> Iterator[Finding]:
    """A loss that rises, swings, or stops at once at what the tokens' frequencies tell."""
    rows = recent_peak(view)
    if len(view.loss) < 8 or view.last < view.warmup_end + 8 or not rows.any():
        return
    level = float(np.median(view.loss[rows]))
    signs = long_steps(view, rows)
    reasons = [_lost(view, level) or (_stuck(view, level) if signs else "")]
    climbing = _climbing(view)
    if not any(reasons) and not climbing:
        return
    before = view.steps <= max(climb(view)[1], view.steps[0])
    lowest = int(view.steps[before][int(np.argmin(view.smooth[before]))])
    yield Finding(
        id="lr_too_large",
        first_step=int(view.warmup_end) if any(reasons) else lowest,
        evidence="; ".join(filter(None, [*reasons, climbing, *signs])),
        cause="the steps go too far: the rate is too large",
        next=find_command(view.history)
        if view.history.config
        else rate_command(view.history, 1 / 10),
        numbers={"level": level, "rise": climb(view)[0]},
    )


def _lost(view: View, level: float) -> str:
    """Whether the loss stands above its start, in words; empty if not."""
    if level <= 1.02 * view.start_loss + min(3 * view.sigma, 0.2 * view.start_loss):
        return ""
    return f"at the full rate the loss is {level:.2f}, above where it began"


def _stuck(view: View, level: float) -> str:
    """Whether only the tokens' frequencies were learned, in words; empty if not."""
    low = view.ignorance
    early = view.last <= view.warmup_end + max(20.0, 0.08 * view.total)
    if low is None or early or view.start_loss - low < 0.2 or level <= KNOWS_NOTHING * low:
        return ""
    return (
        f"at the full rate the loss stays at {level:.2f}; knowing the tokens' frequencies alone "
        f"gives {low:.2f}"
    )


def _climbing(view: View) -> str:
    """Whether the loss climbs and stays up, in words; empty if not."""
    rise, top = climb(view)
    if not rise or jumped(view) or not is_shuffled(view):
        return ""
    if view.warmup_end <= NO_WARMUP and top <= max(10.0, EARLY * view.total):
        return ""  # the missing warmup's doing, unless it does not come back
    text = f"the loss climbs by {rise:.2f} nats from its lowest, by step {int(top):,}"
    if not recovered(view):
        return text
    index = int(np.searchsorted(view.steps, top))
    back = _back_by(view, float(view.smooth[: index + 1].min()), index)
    if back is None or back - top <= SOON_BACK * view.total:
        return ""
    return f"{text}, and is back only at step {int(back):,}"


def _back_by(view: View, level: float, index: int) -> float | None:
    """The first step after a line at which the smoothed loss is down at a level; None if never."""
    back = np.flatnonzero(view.smooth[index:] <= level)
    return float(view.steps[index + int(back[0])]) if back.size else None


def long_steps(view: View, rows: Rows) -> list[str]:
    """What besides the loss says that steps are too long, in words; empty if nothing does."""
    signs = []
    ratio, slope = view.middle("update_ratio", rows), slope_left(view, rows)
    if ratio is not None and ratio > FAST_UPDATE:
        signs.append(f"a step moves the weights by {ratio:.2g} of their size")
    if slope is not None and slope.left + 2 * slope.error < LONG_STEP:
        signs.append(f"the slope behind a step is {100 * slope.left:.0f} % of that before it")
    usual, peak = usual_rates(view), view.planned_peak
    if usual is not None and peak is not None and peak > usual[1]:
        signs.append(f"the rate is {peak:g}; models of 1M to 1B parameters take up to {usual[1]:g}")
    clipped = view.middle("clipped_share", view.settled)
    if signs and clipped is not None and clipped > 0.5:
        signs.append(f"{100 * clipped:.0f} % of the steps are clipped")
    return signs


def jumped(view: View) -> bool:
    """Whether the climb is a jump from one line to the next that the loss is coming back from.

    What stays up for a tenth of the run does not come back.
    """
    if climb(view)[1] < EARLY_JUMP * view.total:
        return False  # before much was learned it is the rate's doing, or the warmup's
    lowest = int(np.argmin(view.smooth))
    after = view.loss[lowest:]
    steps = view.steps[lowest:]
    if len(after) < 3:
        return True
    top = int(np.argmax(after))
    level, height = float(view.smooth[lowest]), float(after[top])
    sharp = float(np.max(np.diff(after[: top + 1]), initial=0.0)) > 0.4 * (height - level)
    coming_back = float(view.loss[-3:].mean()) < level + 0.6 * (height - level)
    young = view.last - float(steps[top]) < 0.1 * view.total
    return sharp and (coming_back or young)


def is_shuffled(view: View) -> bool:
    """Whether the text comes in a random order, so that a climb is not the text's."""
    config = view.history.config
    return config is None or config.data.shuffle


def usual_rates(view: View) -> tuple[float, float] | None:
    """Between which peak rates models of 1M to 1B parameters are trained with this optimizer.

    Wide on purpose: it supports what the curve shows, and is no finding by itself.
    """
    config = view.history.config
    return None if config is None else USUAL_RATES[config.optimizer.name]


def climb(view: View) -> tuple[float, float]:
    """The largest rise of the smoothed loss above its lowest so far, and the step of its top.

    (0, 0) unless it stands out of the noise and counts beside the whole fall.
    """
    if len(view.loss) < 8:
        return 0.0, 0.0
    lowest = np.minimum.accumulate(view.smooth)
    rises = view.smooth - lowest
    # An average of few lines, as at both ends of what is known, is as noisy as they are.
    variances = 1 / (1 + 2 * half_widths(len(view.loss)))
    since = np.maximum.accumulate(np.where(rises > 0, 0, np.arange(len(rises))))
    noise = RISE_SIGMAS * view.sigma * np.sqrt(variances + variances[since])
    fall = float(view.smooth.max() - view.smooth.min())
    counts = (rises > noise) & (rises > RISE_SHARE * fall) & (rises > 0.05)
    if not counts.any():
        return 0.0, 0.0
    index = int(np.argmax(np.where(counts, rises, 0.0)))
    return float(rises[index]), float(view.steps[index])


def recovered(view: View) -> bool:
    """Whether the loss is back at its lowest since, or nearly."""
    lowest = float(view.smooth.min())
    return float(view.smooth[-1]) < lowest + 0.25 * climb(view)[0]


def warmup_too_short(view: View) -> Iterator[Finding]:
    """An early rise, as soon as the rate is full, that the run comes back from."""
    warmup = view.warmup_end
    if warmup > SHORT_WARMUP * view.total or len(view.loss) < 8:
        return
    early = view.steps <= warmup + max(10.0, EARLY * view.total)
    if not early.any():
        return  # a log that begins later
    worst = _worst(view)
    # The lowest until the line before: within one line the fall may come after the rise.
    lowest = np.minimum.accumulate(np.append(worst[0], view.smooth))[:-1]
    rises = (worst - lowest)[early]
    index = int(np.argmax(rises))
    rise, top = float(rises[index]), float(view.steps[index])
    known = bool(np.isfinite(view.lr).any())
    # The highest of many lines stands out of the noise by chance.
    by_chance = CHANCE_SHARE * math.sqrt(2 * math.log(len(rises) + 1))
    sigmas = max(by_chance, RISE_SIGMAS if warmup > NO_WARMUP else NO_WARMUP_SIGMAS)
    if rise < max(EARLY_NATS, sigmas * view.sigma) * (1 if known else 2):
        return
    if float(view.smooth[-1]) > worst[early][index] - 0.5 * rise or view.last < top + 10:
        return  # not on its way back yet
    back = _back_by(view, float(lowest[index]), index) or view.last
    if back - top > (LATE_BACK if known else SOON_BACK) * view.total:
        return  # so late that the rate itself is to blame
    longer = max(20, round(0.05 * view.total), 2 * round(warmup))
    yield Finding(
        id="warmup_too_short",
        first_step=int(warmup),
        last_step=int(top),
        evidence=f"right after a warmup of {int(warmup)} steps the loss jumps up by {rise:.2f} "
        f"nats, by step {int(top):,}, and comes back",
        cause="the full rate came before the weights could bear it",
        next=train_command(
            view.history, *_warmup(view.history.config, longer), name="longer-warmup"
        )
        or f"the same run with a warmup of {longer} steps",
        numbers={"rise": rise, "warmup_steps": warmup},
    )


def _worst(view: View) -> Column:
    """The highest loss of a step since the line before, less what single steps vary by later."""
    excess = view.column("loss_max") - view.loss
    known = np.isfinite(excess)
    later = known & view.settled & (view.steps > EARLY_NOISE * view.last)
    usual = float(excess[later].max()) if later.any() else 0.0
    worst: Column = np.where(known, view.loss + np.maximum(0.0, excess - usual), view.loss)
    return worst


def _warmup(config: Config | None, steps: int) -> list[str]:
    """The options for a warmup of so many steps."""
    words = [f"--schedule.warmup_steps {steps}"]
    if config is not None and config.schedule.warmup_fraction is not None:
        words.append("--schedule.warmup_fraction null")
    return words


def last_rate(view: View) -> float | None:
    """The rate at the end of what is known; None where the last lines do not tell it."""
    rates = view.lr[-LAST_LINES:]
    rates = rates[np.isfinite(rates)]
    return float(rates[-1]) if rates.size else None


def is_level(view: View) -> bool:
    """Whether a log that is whole ends at its highest rate; another may be on its way down."""
    last = last_rate(view)
    if last is None or not view.history.finished:
        return False
    return bool(last > LEVEL * np.nanmax(view.lr))


def no_decay(view: View) -> Iterator[Finding]:
    """A run that ends, or is about to, at its full rate."""
    if view.progress < LATE or len(view.loss) < 20:
        return
    history, last = view.history, last_rate(view)
    if last is None or (history.total_steps is None and not is_level(view)):
        return
    peak = view.planned_peak or float(np.nanmax(view.lr))
    if view.last < view.warmup_end + 0.2 * view.total or not peak > 0:
        return
    end = view.plan.rate(view.plan.total_steps - 1, peak) if view.plan else last
    settled = view.lr[view.settled & np.isfinite(view.lr)]
    if end < UNDECAYED * peak or not settled.size or settled.min() < PEAK_SHARE * peak:
        return
    slope = slope_left(view, recent_peak(view))
    more = ""
    if slope is not None:
        more = (
            f"; {100 * slope.left:.0f} % of the slope is left behind a step: noise holds the loss"
        )
    config = history.config
    remedy = "--schedule.name wsd" if config else ""
    yield Finding(
        id="no_decay",
        first_step=int(view.total * 0.8),
        evidence=f"the rate ends at {end:.2e}, {100 * end / peak:.0f} % of its peak{more}",
        cause="a rate that is never lowered leaves the loss above what the weights already hold: a "
        "decay over the last fifth usually gives 1 to 5 %",
        next=train_command(history, remedy, "--schedule.min_lr 0", name="decayed")
        + f" # what it would give: {probe_command(history, 'cooldown')}"
        if config
        else "go on for a tenth of the steps while the rate falls to 0",
        numbers={"end_share": end / peak},
    )
