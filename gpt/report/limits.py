"""What limits a run, by what branches from one of its checkpoints did: the rules, in plain numbers.

They were chosen, and their mistakes counted, on small runs of known kinds: docs/probes.md has the
tables.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gpt.report.branches import Difference
from gpt.report.evidence import Evidence

Limit = Literal["noise", "rate", "capacity", "data", "not_decided"]
Remedy = Literal["decay", "raise", "lower", "larger", "regularise", "double", "longer", "later"]

# Share of a cooldown's gain that is less noise, from which on noise is the limit.
NOISY = 0.5
# The same where twice the rate surely loses, which speaks for noise too.
LESS_NOISY = 0.3
# Below this share the steps themselves bring the loss down: the rate is far too small.
STEADY = -0.25
# Shares of the validation loss: what counts, and what lies between validation and training loss
# even where the same text is never seen twice.
MATERIAL = 0.01
GAP = 0.03
# A loss that falls by this share over the steps of a branch hides everything else.
FALLING = 0.1
# Below this share of the peak rate, a loss that stands still says nothing of the model.
HIGH = 0.5
# Below this share of the planned steps, twice the rate may win and still be too much for them all.
EARLY = 1 / 3
# Below this share of the steps done, a probe sees a higher rate as worse than it is.
SHORT = 0.04


@dataclass(frozen=True)
class Verdict:
    """What limits the run, what to do about it, and why, a sentence each."""

    limit: Limit
    remedy: Remedy
    reasons: tuple[str, ...]


def judge(found: Evidence) -> Verdict:
    """The first limit that the evidence speaks for, or why it speaks for none."""
    rules: list[tuple[Limit, Remedy, Callable[[Evidence], list[str]]]] = [
        ("data", "regularise", _data),
        ("not_decided", "later", _falling),
        ("rate", "raise" if found.win else "double", _rate),
        ("capacity", "larger", _capacity),
        ("noise", "decay", _noise),
        ("not_decided", "longer" if found.win else "double", _open),
    ]
    return next(
        Verdict(limit, remedy, tuple(reasons))
        for limit, remedy, rule in rules
        if (reasons := rule(found))
    )


def _data(found: Evidence) -> list[str]:
    best = max(0.0, found.gain.value, found.win.value if found.win else 0.0)
    wide = found.gap.is_above(GAP * found.val) and found.gap.value > best
    rising = found.rise is not None and found.rise > MATERIAL * found.val and found.gap.is_above()
    if found.epochs < 1 or not (wide or rising):
        return []
    reasons = [
        f"After {found.epochs:.1f} passes over the text the validation loss is {_nats(found.gap)} "
        f"above the training loss; neither probe could gain as much (at best {best:.4f})."
    ]
    if rising:
        reasons.append(f"It was {found.rise:.4f} nats lower before: it rises.")
    return reasons


def _falling(found: Evidence) -> list[str]:
    if found.drift.value < FALLING * found.val:
        return []
    return [
        f"Over as few steps at the unchanged rate the loss falls by {_nats(found.drift)} still: "
        "that hides what a probe could see."
    ]


def _rate(found: Evidence) -> list[str]:
    if found.win is None:
        if math.isnan(found.noise_share) or found.noise_share > STEADY or found.gain.value >= 0:
            return []
        return [
            f"Cooling down costs {-found.gain.value:.4f} nats: here the steps bring the loss down, "
            "smaller ones less so, and next to no noise is in the way."
        ]
    if not found.win.is_above():
        return []
    reasons = [f"Twice the rate, cooled down alike, ends {_nats(found.win)} lower."]
    if found.step < EARLY * found.total_steps:
        reasons.append(
            f"That holds for now: at step {found.step:,} of {found.total_steps:,} a rate may win "
            "that is too high for the rest."
        )
    elif found.noise_share >= NOISY:
        reasons.append(
            f"There is noise as well: {_percent(found.noise_share)} of what the cooldown gains "
            f"({_nats(found.total)})."
        )
    return reasons


def _capacity(found: Evidence) -> list[str]:
    if found.win is None or found.rate_share < HIGH or found.fall is None:
        return []
    if found.optimizer == "sgd":  # stands still for long before it learns on
        return []
    least = MATERIAL * found.val
    if max(found.total.value, found.rise or 0.0) > least or found.fall > MATERIAL:
        return []
    if found.gap.value > GAP * found.val:
        return []
    return [
        f"The loss fell by {found.fall:.1%} over the last quarter of the run, and cooled down it "
        f"falls by {_nats(found.total)}, less than {MATERIAL:.0%}.",
        _twice(found.win),
        f"The validation loss is {found.gap.value:+.4f} nats from the training loss: the model "
        "does not learn the text by heart either.",
    ]


def _noise(found: Evidence) -> list[str]:
    sure = found.gain.is_above()
    loses = found.win is not None and _loses(found.win)
    noisy = found.noise_share >= NOISY and (sure or loses)
    if not (noisy or (found.noise_share >= LESS_NOISY and sure and loses)):
        return []
    reasons = [
        f"Cooling down gains {_nats(found.gain)} over as many steps at the unchanged rate: "
        f"{_percent(found.noise_share)} of what it gains over the checkpoint is less noise."
    ]
    if found.win is not None:
        reasons.append(_twice(found.win))
        if found.steps < SHORT * found.step or found.optimizer == "sgd":
            why = "With SGD" if found.optimizer == "sgd" else "In so short a probe"
            reasons.append(f"{why} a higher rate looks worse than it is in the long run.")
    return reasons


def _open(found: Evidence) -> list[str]:
    if not found.total.is_above():
        reasons = [f"The cooldown gains nothing that is sure ({_nats(found.total)})."]
    elif math.isnan(found.noise_share) or found.noise_share < NOISY:
        reasons = [
            f"Of what the cooldown gains ({_nats(found.total)}), {_percent(found.noise_share)} is "
            "less noise: noise is not all that there is."
        ]
    else:
        reasons = [
            f"The cooldown's gain over the unchanged rate is not sure ({_nats(found.gain)})."
        ]
    if found.win is None:
        reasons.append("Whether the rate or the model is the limit, --probe double tells.")
    else:
        reasons += [_twice(found.win), "More steps may decide it."]
    return reasons


def _twice(win: Difference) -> str:
    """What twice the rate did where it did not surely win."""
    if win.value == -math.inf:
        return "Twice the rate breaks the training."
    if _loses(win):
        return f"Twice the rate, cooled down alike, ends {-win.value:.4f} ± {win.error:.4f} higher."
    return f"Twice the rate makes no difference that is sure ({_nats(win)})."


def _loses(win: Difference) -> bool:
    """Whether twice the rate is surely worse."""
    return win.value == -math.inf or Difference(-win.value, win.error).is_above()


def _nats(difference: Difference) -> str:
    return f"{difference.value:.4f} ± {difference.error:.4f} nats"


def _percent(share: float) -> str:
    """A share in words; beyond 1 the rest of the loss would have risen."""
    if math.isnan(share):
        return "none"
    return "all" if share >= 1 else f"{max(0.0, share):.0%}"
