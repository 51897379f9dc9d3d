"""Too small, right, too large, diverged: which label fits the runs at several rates, and why.

The rule, in order. `best` is the rate with the lowest mean final validation loss over its seeds.

1. diverged: loss or gradient stopped being finite, or the loss left its start and ended there
   again or above. One such seed is enough for its rate, since that rate cannot be relied on.
2. Is even `best` right? Too small, if it never left the start; or if it is the highest tried and
   gained as much over the next one below as that one over its own (with fewer than three rates:
   if it has hardly learned more than the frequencies of the tokens). Too large, if its loss climbed
   back up, or fell at once to those frequencies and no further, with no sounder rate within a
   factor of 10 below.
3. right: `best`, if it is, and whatever ended within the tolerance of it: 1 %, or twice the
   standard error between seeds if that is more.
4. The others by their side of `best`: too small below, too large above; but diverged, if they
   ended above it where they began.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gpt.lr.outcome import Run
from gpt.lr.rates import MAX_LR, rate_text

Label = Literal["too_small", "right", "too_large", "diverged"]

# About what a factor of 2 to 3 beside the best rate costs: x1/2 +0.36 %, x2 +0.55 %, x4 +2.3 %.
# Source: computed from Step Law's public grid of 1,911 runs (Li et al. 2025, arXiv:2503.04715).
TOLERANCE = 0.01
FREQUENCIES = 0.9  # of the unigram entropy: who ends above knows little but which ids are common
QUICK = 0.9  # of the whole fall; measured: 0.96 and more at ruinous rates, 0.8 at the right one
STEEP = 0.8  # of the slope before: a loss that falls on with the rate as it did
NEAR = 10.001  # of rates further apart than x10, none says anything of the other


DEAD = "fell at once to the tokens' frequencies, and hardly further"
IDLE = "the loss stays where it began"


@dataclass(frozen=True)
class Rate:
    """All runs at one rate. `evidence` is what the label rests on, in a few words."""

    lr: float
    runs: tuple[Run, ...]
    label: Label = "diverged"
    evidence: str = ""

    @property
    def losses(self) -> list[float]:
        """Final validation losses of the runs that have one."""
        return [run.val_loss for run in self.runs if run.val_loss is not None]

    @property
    def diverged(self) -> bool:
        """Whether any seed was lost."""
        return any(run.lost != "" for run in self.runs)

    @property
    def mean(self) -> float:
        """Mean final validation loss; infinite if a seed was lost."""
        return math.inf if self.diverged else statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation between the seeds; None for fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def idle(self) -> bool:
        """Whether no seed ever left the start."""
        return all(run.idle for run in self.runs)

    @property
    def unstable(self) -> bool:
        """Whether the loss of any seed climbed back up."""
        return any(run.climb[0] > 0 for run in self.runs)

    @property
    def quick(self) -> bool:
        """Whether nearly all of the fall was over after a fifth of the run."""
        return statistics.fmean(run.early_share for run in self.runs) > QUICK

    def is_sound(self, ignorance: float) -> bool:
        """Whether no seed was lost, none climbed back, and it did not stop at this loss at once."""
        return not (self.diverged or self.unstable or (self.mean > ignorance and self.quick))


@dataclass(frozen=True)
class Verdict:
    """Every rate with its label, lowest first; what to say besides; rates worth trying next."""

    rates: tuple[Rate, ...]
    best: float | None
    tolerance: float
    notes: tuple[str, ...]
    next_lrs: tuple[float, ...]

    def label_of(self, run: Run) -> Label:
        """The label of one run: its rate's, save for a sound run beside one that diverged."""
        rate = next(rate for rate in self.rates if rate.lr == run.lr)
        sound = not (run.lost or run.idle)
        return "too_large" if rate.label == "diverged" and sound else rate.label


def judge(runs: Iterable[Run], unigram_entropy: float) -> Verdict:
    """Labels the rates of `runs`. `unigram_entropy` is the training tokens', in nats per token."""
    by_lr: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.lr, run.seed)):
        by_lr.setdefault(run.lr, []).append(run)
    rates = [Rate(lr, tuple(members)) for lr, members in by_lr.items()]
    if not rates:
        return Verdict((), None, math.nan, (), ())
    sound = [rate for rate in rates if not rate.diverged]
    if not sound:
        labelled = tuple(replace(rate, evidence=_loss_of(rate)) for rate in rates)
        return Verdict(labelled, None, math.nan, *_all_diverged(rates))
    best = min(sound, key=lambda rate: rate.mean)
    tolerance = _tolerance(sound, best)
    flaw = _flaw(rates, best, tolerance, unigram_entropy)
    labelled = tuple(_labelled(rate, best, tolerance, flaw) for rate in rates)
    return Verdict(labelled, best.lr, tolerance, *_beyond(labelled, best.lr))


def _tolerance(sound: Sequence[Rate], best: Rate) -> float:
    """How far above the best mean a rate may end and still be right, in nats per token.

    The seeds' spread is pooled over the rates within 1 %: those further off are often noisier, and
    must not excuse themselves by it.
    """
    close = [rate for rate in sound if rate.mean <= best.mean * (1 + TOLERANCE)]
    squares = sum((loss - rate.mean) ** 2 for rate in close for loss in rate.losses)
    freedom = sum(len(rate.losses) - 1 for rate in close)
    deviation = math.sqrt(squares / freedom) if freedom else 0.0
    noise = 2 * deviation * math.sqrt(2 / len(best.losses))
    return max(TOLERANCE * best.mean, noise)


def _flaw(
    rates: Sequence[Rate], best: Rate, tolerance: float, unigram_entropy: float
) -> tuple[Label, str] | None:
    """Why even the best of these rates is not right: its label and the evidence; None if it is."""
    ignorance = FREQUENCIES * unigram_entropy
    highest = best is rates[-1]
    if best.idle:
        return "too_small", IDLE
    if not best.is_sound(ignorance):
        near_below = [rate for rate in rates if rate.lr < best.lr <= NEAR * rate.lr]
        if not any(rate.is_sound(ignorance) for rate in near_below):
            return "too_large", _instability(best) or DEAD
    elif highest and len(rates) < 3 and best.mean > ignorance:
        return "too_small", "still falling, hardly below the tokens' frequencies"
    elif highest and _is_steep(rates, tolerance):
        return "too_small", "the lowest; the loss falls with the rate as steeply as before"
    return None


def _is_steep(rates: Sequence[Rate], tolerance: float) -> bool:
    """Whether the loss falls towards the highest rate without flattening, over log lr."""
    if len(rates) < 3 or any(rate.diverged for rate in rates[-3:]):
        return False
    low, middle, high = rates[-3:]
    before = (low.mean - middle.mean) / math.log(middle.lr / low.lr)
    last = (middle.mean - high.mean) / math.log(high.lr / middle.lr)
    return middle.mean - high.mean > tolerance and last > STEEP * before


def _labelled(rate: Rate, best: Rate, tolerance: float, flaw: tuple[Label, str] | None) -> Rate:
    """The rate with its label and the evidence for it."""
    if rate.diverged:
        return replace(rate, label="diverged", evidence=_loss_of(rate))
    above = rate.mean / best.mean - 1
    if rate.lr == best.lr:
        label, evidence = flaw or ("right", "the lowest")
        more = [] if flaw else [_instability(rate), _late_rise(rate)]
        return replace(rate, label=label, evidence="; ".join(filter(None, [evidence, *more])))
    parts = [f"{above:+.1%}"]
    if rate.mean <= best.mean + tolerance and not flaw:
        parts.append("within 1 %" if above <= TOLERANCE else "within the seeds' spread")
        return replace(rate, label="right", evidence=", ".join(parts))
    label = "too_small" if rate.lr < best.lr else "too_large"
    if flaw and flaw[0] == "too_large" and (rate.unstable or rate.quick):
        label = "too_large"
    elif rate.idle:
        label = "too_small" if best.idle or rate.lr < best.lr else "diverged"
    parts += _behaviour(rate, best)
    return replace(rate, label=label, evidence="; ".join(parts))


def _behaviour(rate: Rate, best: Rate) -> list[str]:
    """What the curves show, beside the loss at their end."""
    found = []
    if rate.idle:
        found.append(IDLE)
    elif unstable := _instability(rate):
        found.append(unstable)
    else:
        found.append("smooth")
    if rise := _late_rise(rate):
        found.append(rise)
    ratio = _median_norm(rate) / _median_norm(best)
    if ratio > 3:
        found.append(f"gradients {ratio:.0f}x as long")
    if passed := _passed(rate, best):
        found.append(passed)
    return found


def _instability(rate: Rate) -> str:
    """The largest climb of any seed, in words; empty if there is none."""
    rise, step = max(run.climb for run in rate.runs)
    return f"climbs {rise:.2f} nats by step {step:,}" if rise else ""


def _late_rise(rate: Rate) -> str:
    """Whether validation was clearly better before the end, as it is when a run overfits."""
    run = max(rate.runs, key=lambda run: run.late_rise)
    if run.late_rise <= TOLERANCE or run.best is None:
        return ""
    return f"val loss rises from {run.best[1]:.4f} at step {run.best[0]:,}"


def _median_norm(rate: Rate) -> float:
    norms = [norm for run in rate.runs for norm in run.grad_norms]
    return statistics.median(norms) if norms else math.nan


def _passed(rate: Rate, best: Rate) -> str:
    """From which share of its evaluations on the best rate is below where this one ends."""
    steps, losses = best.runs[0].val
    ahead = next((i for i, loss in enumerate(losses) if loss < rate.mean), len(steps) - 1)
    if ahead >= len(steps) - 1:
        return ""
    return f"{rate_text(best.lr)} is there after {steps[ahead] / steps[-1]:.0%} of the steps"


def _loss_of(rate: Rate) -> str:
    """How the seeds of a rate were lost."""
    lost = [run for run in rate.runs if run.lost]
    share = f"{len(lost)} of {len(rate.runs)} seeds: " if len(rate.runs) > 1 else ""
    return share + lost[0].lost


def _all_diverged(rates: Sequence[Rate]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    lowest = rates[0].lr
    note = "every rate diverged; try far smaller ones"
    return (note,), _rounded([lowest / 1000, lowest / 100, lowest / 10])


def _beyond(rates: Sequence[Rate], best: float) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What the grid leaves open about the best rate, and the rates that would tell."""
    lrs = [rate.lr for rate in rates]
    place = lrs.index(best)
    label = rates[place].label
    notes: list[str] = []
    wanted: list[float] = []
    if label == "too_small":
        notes.append(f"no rate is right: even {rate_text(best)}, the best, is too small")
    elif label == "too_large":
        notes.append(f"no rate is right: even {rate_text(best)}, the best, is too large")
    if place == len(lrs) - 1 and label != "too_large":
        if label == "right":
            notes.append(f"{rate_text(best)} is the highest tried; the right rate may lie above")
        wanted += [best * 3, best * 10]
    if label == "too_large" or (place == 0 and label == "right"):
        if label == "right":
            notes.append(f"{rate_text(best)} is the lowest tried; the right rate may lie below")
        wanted += [lrs[0] / 10, lrs[0] / 3]
    for low, high in itertools.pairwise(lrs):
        if best in (low, high) and high > NEAR * low:
            notes.append(f"nothing was tried between {rate_text(low)} and {rate_text(high)}")
            steps = math.ceil(math.log10(high / low))
            wanted += [low * (high / low) ** (step / steps) for step in range(1, steps)]
    return tuple(notes), _rounded(wanted)


def _rounded(lrs: Iterable[float]) -> tuple[float, ...]:
    """Rates in two digits, lowest first, those that a config can hold."""
    return tuple(sorted({float(f"{lr:.1e}") for lr in lrs if lr <= MAX_LR}))
