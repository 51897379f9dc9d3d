"""The command to type after a probe, for each remedy."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from gpt.config import Config
from gpt.configfile import under_new_name
from gpt.health.advice import place_options
from gpt.lr.rates import rate_options
from gpt.plan import Plan
from gpt.report.limits import Remedy

DECAY_SHARE = 0.2  # of the steps done, that a decay takes (Hägele et al. 2024: 10 to 20 %)
_DROPOUT = 0.1


@dataclass(frozen=True)
class Standing:
    """A run as it stands: its config and plan, and the step of its newest checkpoint."""

    run: Path
    config: Config
    plan: Plan
    newest: int


def next_command(at: Standing, remedy: Remedy, steps: int) -> str:
    """What to type for a run that was probed with `steps` a branch."""
    file, config = str(at.run / "config.yaml"), at.config
    probe = ["gpt-report", str(at.run), "--probe", "double"]
    train = ["gpt-train", "--config", file]
    go_on = [*train, *place_options(config, at.run)]
    left = at.newest < at.plan.total_steps
    match remedy:
        case "decay" if not _decays(at.plan):
            words = [*go_on, *_decay_now(config, at.newest, steps)]
        case "decay" | "later":  # the schedule itself brings the rate down, or has
            words = go_on if left else ["gpt-report", str(at.run)]
        case "raise" | "lower" if left:
            factor = 2 if remedy == "raise" else 1 / 3
            words = [
                *go_on,
                "--rate",
                "override",
                *rate_options(config, factor * config.optimizer.lr),
            ]
        case "raise" | "lower":
            words = ["gpt-lr", "find", "--config", file]
        case "larger":
            wider = ["--model.n_embd", str(2 * config.model.n_embd)]
            words = [*train, *under_new_name(config, "wider"), *wider]
        case "regularise":
            dropout = min(0.5, config.model.dropout + _DROPOUT)
            words = [*train, *under_new_name(config, "dropout"), "--model.dropout", f"{dropout:g}"]
        case "double":
            words = probe
        case "longer":
            words = [*probe, "--steps", str(2 * steps)]
    return shlex.join(words)


def _decays(plan: Plan) -> bool:
    """Whether the schedule itself brings the rate down before its end."""
    return plan.name != "inverse_sqrt" and plan.factor(plan.total_steps - 1) < 0.5


def _decay_now(config: Config, newest: int, steps: int) -> list[str]:
    """From the newest checkpoint on the rate comes down to 0, as it did in the probe."""
    end = newest + max(steps, round(DECAY_SHARE * newest))
    warmup = "fraction" if config.schedule.warmup_steps is None else "steps"
    words = ["--rate", "rewarm", "--schedule.name", "wsd", f"--schedule.warmup_{warmup}", "0"]
    if config.schedule.decay_steps is not None:
        words += ["--schedule.decay_steps", "null"]
    words += ["--schedule.decay_fraction", "1", "--schedule.min_lr", "0"]
    words += ["--train.max_steps", str(end)]
    for name in ("max_tokens", "max_epochs"):
        if getattr(config.train, name) is not None:
            words += [f"--train.{name}", "null"]
    return words
