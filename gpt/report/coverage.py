"""What a log lets one judge: the signals that it has, and the checks that it has too few for."""

from collections.abc import Callable
from dataclasses import dataclass

from gpt.history import History

_SIGNALS: dict[str, Callable[[History], bool]] = {
    "training loss": lambda h: "loss" in h.train,
    "validation loss": lambda h: "val_loss" in h.evals,
    "rate": lambda h: "lr" in h.train,
    "gradient norm": lambda h: "grad_norm" in h.train,
    "update ratio": lambda h: "update_ratio" in h.train,
    "slope along the update": lambda h: "slope_after" in h.train,
    "Adam's RMS": lambda h: "adam_rms" in h.train,
    "noise scale": lambda h: "noise_scale" in h.train,
    "layers": lambda h: len(h.layers) > 0,
    "speed": lambda h: "tokens_per_s" in h.train or "time_s" in h.train,
    "vocabulary": lambda h: h.vocab_size is not None,
    "planned length": lambda h: h.total_steps is not None,
    "data check": lambda h: bool(h.data_check),
}
# Each finding with the signals that its check cannot do without.
_CHECKS: dict[str, tuple[str, ...]] = {
    "nonfinite": ("training loss",),
    "wrong_tokenizer": ("data check",),
    "data_leak": ("data check",),
    "data_duplicate": ("data check",),
    "data_order": ("training loss",),
    "stuck_at_chance": ("training loss", "vocabulary"),
    "lr_too_large": ("training loss",),
    "lr_too_small": ("training loss", "rate"),
    "dead_layer": ("layers",),
    "warmup_too_short": ("training loss", "rate"),
    "spike": ("training loss",),
    "overfitting": ("training loss", "validation loss"),
    "plateau": ("training loss",),
    "no_decay": ("rate", "planned length"),
    "throughput": ("speed",),
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
    there = {name for name, has in _SIGNALS.items() if has(history)}
    unmade = [
        Unmade(check, tuple(name for name in needs if name not in there))
        for check, needs in _CHECKS.items()
        if not there.issuperset(needs)
    ]
    return Coverage(tuple(name for name in _SIGNALS if name in there), tuple(unmade))
