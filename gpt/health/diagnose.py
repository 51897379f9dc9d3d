"""All rules over one run's history: findings in order of importance."""

from collections.abc import Callable, Iterator

import numpy as np

from gpt.health.events import nonfinite, spike, throughput
from gpt.health.finding import IDS, Finding
from gpt.health.learning import dead_layer, overfitting, plateau, stuck_at_chance
from gpt.health.rates import lr_too_large, lr_too_small, no_decay, warmup_too_short
from gpt.health.texts import data_duplicate, data_leak, data_order, wrong_tokenizer
from gpt.health.view import View
from gpt.history import History

Rule = Callable[[View], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    nonfinite,
    wrong_tokenizer,
    data_leak,
    data_duplicate,
    data_order,
    stuck_at_chance,
    lr_too_large,
    lr_too_small,
    dead_layer,
    warmup_too_short,
    spike,
    overfitting,
    plateau,
    no_decay,
    throughput,
)
# What can be said before there is a curve.
EARLY_RULES: tuple[Rule, ...] = (nonfinite, wrong_tokenizer, data_leak, data_duplicate)
LEAST_LINES = 4
# What a finding explains: where it is there, these are its consequences, and not told besides.
EXPLAINS: dict[str, tuple[str, ...]] = {
    "nonfinite": ("lr_too_large", "spike", "warmup_too_short"),
    "lr_too_large": ("stuck_at_chance", "warmup_too_short", "spike", "plateau", "dead_layer"),
    "lr_too_small": ("stuck_at_chance", "plateau", "no_decay"),
    "dead_layer": ("stuck_at_chance", "plateau"),
    "stuck_at_chance": ("plateau", "no_decay"),
    "data_duplicate": ("overfitting", "plateau"),
    "data_order": ("spike", "lr_too_large", "warmup_too_short"),
    "warmup_too_short": ("spike",),
    "overfitting": ("no_decay",),
    "plateau": ("no_decay",),
}


def verdict(history: History) -> str:
    """How a run did, in one line."""
    findings = diagnose(history)
    if not findings:
        return "healthy: nothing was found"
    return "; ".join(f"{finding.id} (from step {finding.first_step:,})" for finding in findings)


def diagnose(history: History) -> list[Finding]:
    """What is wrong with the run, most important first; an empty list for a healthy one.

    A finding that another one explains is left out. Rules whose signals were not logged stay
    silent.
    """
    view = View(history)
    rules = RULES if len(view.loss) >= LEAST_LINES else EARLY_RULES
    with np.errstate(all="ignore"):  # a log may hold any number; what comes of it is inf or nan
        found = {finding.id: finding for rule in rules for finding in rule(view)}
    explained = {other for name in found for other in EXPLAINS.get(name, ())}
    return sorted(
        (finding for name, finding in found.items() if name not in explained),
        key=lambda finding: IDS.index(finding.id),
    )
