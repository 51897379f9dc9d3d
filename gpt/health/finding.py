"""What a diagnosis consists of."""

from dataclasses import dataclass, field

# In order of importance: what comes first explains most of what comes after it.
IDS = (
    "nonfinite",
    "wrong_tokenizer",
    "data_leak",
    "data_duplicate",
    "data_order",
    "stuck_at_chance",
    "lr_too_large",
    "lr_too_small",
    "dead_layer",
    "warmup_too_short",
    "overfitting",
    "plateau",
    "spike",
    "no_decay",
    "throughput",
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Attributes:
        id: one of IDS.
        first_step: where it begins, as far as the evidence shows.
        last_step: where it ended; None while it goes on.
        evidence: what was measured, in numbers.
        cause: the likely reason, in words.
        next: a command to type, remarks behind a #; words where there is none.
        numbers: the evidence for programs.
    """

    id: str
    first_step: int
    evidence: str
    cause: str
    next: str
    last_step: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)
