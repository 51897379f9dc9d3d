"""Rules about what is learned: nothing, no more, by heart; and layers that take no part in it."""

import math
from collections.abc import Iterator

import numpy as np

from gpt.health.advice import probe_command, text_command, train_command
from gpt.health.finding import Finding
from gpt.health.view import AT_CHANCE, MAD_TO_SIGMA, View, is_a_guess, theil_sen
from gpt.history import Column, Rows

AT_FREQUENCIES = 0.05  # share of the unigram entropy around it, which a BPE has of noise too
FLAT_AT_FREQUENCIES = 0.03
FLAT_WINDOW = 0.2  # share of the run that must be flat
FLAT_STEPS = 80
FLAT_FALL = 0.01  # of the loss, that such a window may still fall by
FLAT_OF_START = 0.004  # of the first loss: what is less is no progress, however low the level
LEARNED = 0.9  # of the first loss: where a plateau is below
RATE_IN_USE = 0.3  # of the peak; below it a loss that stands still is what a decay does
DEAD_GRADIENT = 1e-5  # of the median gradient of all matrices
DEAD_FEATURES = 0.99
DEAD_LINES = 2


def stuck_at_chance(view: View) -> Iterator[Finding]:
    """A loss that stays at ln V, or at the tokens' frequencies, whatever the weights do."""
    if len(view.loss) < 10 or view.progress < 0.2 or view.last < view.warmup_end + 30:
        return
    low, chance = view.ignorance, view.history.chance
    if chance is None and is_a_guess(float(np.median(view.loss))):
        chance = float(np.median(view.loss))
    peak_end = float(view.steps[view.at_peak][-1]) if view.at_peak.any() else view.last
    half = (view.steps > 0.5 * peak_end) & (view.steps <= peak_end)
    if half.sum() < 5:
        return
    end = float(np.median(view.loss[half]))
    slope, slope_low, slope_high = theil_sen(view.steps[half], view.loss[half])
    span = 0.5 * peak_end
    moved = slope * span
    if chance is not None and abs(end - chance) < AT_CHANCE * chance and abs(moved) < 0.01 * chance:
        place = f"ln {math.exp(chance):,.0f} = {chance:.3f} is the loss of a guess"
        cause = (
            "nothing is learned: the rate is (nearly) zero, the gradient does not reach the "
            "weights, or the targets do not follow from the inputs"
        )
    elif (
        low is not None
        and abs(end - low) < AT_FREQUENCIES * low
        and max(abs(slope_low), abs(slope_high)) * span < FLAT_AT_FREQUENCIES * low
        and (chance is None or chance - low > 0.02)
    ):
        place = f"{low:.3f}, the entropy of the tokens' frequencies"
        cause = (
            "the model knows which tokens are frequent and no more: the text has no order to learn "
            "(shuffled, encrypted, random), or attention does not work"
        )
    else:
        return
    yield Finding(
        id="stuck_at_chance",
        first_step=int(view.steps[half][0]),
        evidence=f"the loss stands at {end:.3f} up to step {int(peak_end):,}; {place}",
        cause=cause,
        next=_look_at_the_text(view),
        numbers={"loss": end},
    )


def _look_at_the_text(view: View) -> str:
    """To see whether the text is what it should be."""
    command, question = text_command(view.history), "does the decoded text read as it should?"
    return f"{command} # {question}" if command else f"look at a batch: {question}"


def plateau(view: View) -> Iterator[Finding]:
    """A loss that has stopped falling although the rate is in use."""
    peak = view.planned_peak
    in_use = np.ones(len(view.steps), bool)
    if peak is not None:
        in_use = ~(view.lr < RATE_IN_USE * peak)
    if not in_use.any() or len(view.loss) < 30:
        return
    end = float(view.steps[in_use][-1])
    start = end - FLAT_WINDOW * view.total
    rows = in_use & (view.steps > start)
    if (
        start < max(view.warmup_end, 0.05 * view.total)
        or rows.sum() < 10
        or end - start < FLAT_STEPS
    ):
        return
    _, low, high = theil_sen(view.steps[rows], view.loss[rows])
    span = float(view.steps[rows][-1] - view.steps[rows][0])
    level = float(np.median(view.loss[rows]))
    if level > LEARNED * view.start_loss:
        return  # nothing was learned before it, which is another matter
    # As much as another such window could bring, by the interval of the slope.
    most = max(abs(low), abs(high)) * span
    if most > max(FLAT_FALL * level, FLAT_OF_START * view.start_loss):
        return
    yield Finding(
        id="plateau",
        first_step=int(_onset(view, level)),
        evidence=f"the loss stands at {level:.3f} over the last {int(span):,} steps: with 95 % "
        f"certainty it changed by less than {most:.3f}",
        cause="nothing left to learn at this size, from this text, or at this noise",
        next=f"{probe_command(view.history, 'cooldown')} # tells noise from capacity"
        if view.history.config
        else "a decay of the rate over some steps tells noise from capacity",
        numbers={"level": level, "change": most},
    )


def _onset(view: View, level: float) -> float:
    """The first step at which the smoothed loss was as low as a level."""
    reached = np.flatnonzero(view.smooth < level + max(2 * view.sigma, 0.01 * level))
    return float(view.steps[int(reached[0])]) if reached.size else view.last


def overfitting(view: View) -> Iterator[Finding]:
    """Validation rises from its best while training still falls."""
    evals = view.history.evals
    if "val_loss" not in evals:
        return
    known = np.isfinite(evals["val_loss"])
    steps, losses = evals["step"][known], evals["val_loss"][known]
    if len(losses) < 3:
        return
    best = int(np.argmin(losses))
    after = losses[best + 1 :]
    if not after.size:
        return
    noise = _noise_of(losses)
    rise = float(after[-1] - losses[best])
    limit = max(0.005 * losses[best], 2 * noise)
    needed = 1 if rise > max(0.05 * losses[best], 8 * noise) else 2 if rise > 2 * limit else 3
    if len(after) < needed or (after[-needed:] <= losses[best] + limit).any():
        return
    train_then, train_now = (_train_at(view, step) for step in (steps[best], steps[-1]))
    if train_then is None or train_now is None or train_now > train_then - 0.5 * limit:
        return  # training rises, or stands still, too: no learning by heart
    data_epochs = view.history.train["epoch"]
    passes = float(data_epochs[-1]) if len(data_epochs) else math.nan
    text = f", after {passes:.1f} passes over the text" if passes > 1 else ""
    yield Finding(
        id="overfitting",
        first_step=int(steps[best]),
        evidence=f"validation rises from {losses[best]:.3f} at step {int(steps[best]):,} to "
        f"{after[-1]:.3f} while training falls from {train_then:.3f} to {train_now:.3f}{text}",
        cause="the model learns the training text by heart",
        next=_against_overfitting(view, int(steps[best])),
        numbers={"rise": rise, "best": float(losses[best])},
    )


def _against_overfitting(view: View, best_step: int) -> str:
    config = view.history.config
    if config is None:
        return f"stop at step {best_step:,}; more text, dropout 0.2, or a smaller model"
    changes = ["--eval.patience 3"]
    if config.model.dropout < 0.2:
        changes.append("--model.dropout 0.2")
    return (
        train_command(view.history, *changes, name="dropout")
        + " # more text helps more; gpt-infer takes the best checkpoint anyway"
    )


def _noise_of(losses: Column) -> float:
    """Noise of a series of evaluations, from second differences, which a bend hardly disturbs."""
    if len(losses) < 5:
        return 0.002 * float(np.median(losses))
    second = np.abs(np.diff(losses, 2))
    return float(MAD_TO_SIGMA * np.median(second) / math.sqrt(6))


def _train_at(view: View, step: float) -> float | None:
    """The smoothed training loss at a step: the mean of a few lines before it."""
    before = np.flatnonzero(view.steps <= step)
    if not before.size:
        return None
    width = max(3, len(view.loss) // 20)
    return float(view.loss[before[-width:]].mean())


def dead_layer(view: View) -> Iterator[Finding]:
    """Matrices that no gradient reaches, or features that are zero at every token."""
    layers = view.history.layers
    if len(layers) < DEAD_LINES + 1 or view.last < view.warmup_end + 20:
        return
    gradients = {
        name: values
        for name, values in layers.named("grad_norm").items()
        if name.endswith("weight") and "norm" not in name
    }
    dead: dict[str, float] = {}
    since = len(layers) - DEAD_LINES
    if len(gradients) > 2:
        median = np.median(np.stack(list(gradients.values())), axis=0)
        for name, values in gradients.items():
            share = values / np.maximum(median, 1e-30)
            if (share[-DEAD_LINES:] < DEAD_GRADIENT).all():
                dead[name] = float(share[-DEAD_LINES:].max())
                since = min(since, _first_of_last(share < DEAD_GRADIENT))
    silent = {
        name: float(values[-1])
        for name, values in layers.named("dead_share").items()
        if (values[-DEAD_LINES:] > DEAD_FEATURES).all()
    }
    if not dead and not silent:
        return
    parts = []
    if dead:
        some = ", ".join(list(dead)[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        parts.append(f"{some}: a gradient below {max(dead.values()):.0e} of the others'")
    parts += [
        f"{name}: {100 * share:.0f} % of the MLP's features are 0 at every token"
        for name, share in list(silent.items())[:3]
    ]
    config = view.history.config
    yield Finding(
        id="dead_layer",
        first_step=int(layers["step"][since]),
        evidence="; ".join(parts),
        cause="these weights take no part in learning: an initialisation that is too small or too "
        "large for the activation, or a rate that killed them",
        next=train_command(view.history, "--model.init zero_proj", name="alive")
        if config
        else "another initialisation, or a lower rate with a longer warmup",
        numbers={"layers": len(dead) + len(silent)},
    )


def _first_of_last(rows: Rows) -> int:
    """The first index of the unbroken stretch that reaches the end."""
    others = np.flatnonzero(~rows)
    return int(others[-1]) + 1 if others.size else 0
