"""What a log lets one judge: the signals that it has, and the checks that it has too few for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gpt.health.diagnose import LEAST_LINES
from gpt.health.rates import is_level, last_rate
from gpt.health.view import View, is_a_guess
from gpt.history import History

Has = Callable[[History], bool]

_SIGNALS: dict[str, Has] = {
    "training loss": lambda h: "loss" in h.train,
    "validation loss": lambda h: "val_loss" in h.evals,
    "rate": lambda h: "lr" in h.train,
    "gradient norm": lambda h: "grad_norm" in h.train,
    "update ratio": lambda h: "update_ratio" in h.train,
    "slope along the update": lambda h: "slope_after" in h.train,
    "Adam's RMS": lambda h: "adam_rms" in h.train,
    "noise scale": lambda h: "noise_scale" in h.train,
    "layers": lambda h: len(h.layers) > 0,
    "speed": lambda h: "tokens_per_s" in h.train or "step_time_s" in h.train,
    "vocabulary": lambda h: h.vocab_size is not None,
    "planned length": lambda h: h.total_steps is not None,
    "data check": lambda h: bool(h.data_check),
}


def _any_loss(history: History) -> bool:
    """Whether a loss was written, be it a number or not, or that there was none that is one."""
    tables = ((history.train, "loss"), (history.evals, "val_loss"))
    told = any(event.get("event") in ("nonfinite", "diverged") for event in history.events)
    return told or any(len(table) and name in table.columns for table, name in tables)


def _chance(history: History) -> bool:
    """Whether it is known what a guess would reach: by what the log says, or as it stands there."""
    losses = View(history).loss
    known = history.vocab_size is not None or history.unigram_entropy is not None
    return known or bool(len(losses) and is_a_guess(float(np.median(losses))))


def _length(history: History) -> bool:
    """Whether it is known how far the run is: a rate still at its peak may end there, or not."""
    return history.total_steps is not None or is_level(View(history))


def _signals(*names: str) -> dict[str, Has]:
    return {name: _SIGNALS[name] for name in names}


_CURVE: dict[str, Has] = {
    f"{LEAST_LINES} training losses": lambda h: len(View(h).loss) >= LEAST_LINES
}
# Each finding with what its check cannot do without.
_CHECKS: dict[str, Mapping[str, Has]] = {
    "nonfinite": {"loss": _any_loss},
    "wrong_tokenizer": _signals("data check", "vocabulary"),
    "data_leak": _signals("data check"),
    "data_duplicate": _signals("data check"),
    "data_order": _CURVE | {"config": lambda h: h.config is not None},
    "stuck_at_chance": _CURVE | {"vocabulary": _chance},
    "lr_too_large": _CURVE,
    "lr_too_small": _CURVE,
    "dead_layer": _CURVE | _signals("layers"),
    "warmup_too_short": _CURVE,
    "spike": _CURVE,
    "overfitting": _CURVE | _signals("validation loss"),
    "plateau": _CURVE,
    "no_decay": _CURVE
    | {"rate at the end": lambda h: last_rate(View(h)) is not None, "planned length": _length},
    "throughput": _CURVE | _signals("speed"),
}


@dataclass(frozen=True)
class Unmade:
    """A check that could not be made: the finding that it would have made, what it lacked."""

    id: str
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """What could be judged from: signals by name, and the checks that lacked some."""

    signals: tuple[str, ...]
    unmade: tuple[Unmade, ...]

    def unmade_words(self) -> str:
        """The checks that were not made, with what they lack; empty if all were."""
        by_lack: dict[tuple[str, ...], list[str]] = {}
        for each in self.unmade:
            by_lack.setdefault(each.lacks, []).append(each.id)
        return "; ".join(
            f"{', '.join(ids)} (no {', no '.join(lacks)})" for lacks, ids in by_lack.items()
        )


def coverage(history: History) -> Coverage:
    """Looks which signals a log has."""
    signals = tuple(name for name, has in _SIGNALS.items() if has(history))
    lacking = {
        check: tuple(name for name, has in needs.items() if not has(history))
        for check, needs in _CHECKS.items()
    }
    unmade = tuple(Unmade(check, lacks) for check, lacks in lacking.items() if lacks)
    return Coverage(signals, unmade)
