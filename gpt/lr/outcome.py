"""What one training did, read from its metrics.jsonl: how low, how steadily, whether it was lost.

Comparing several of them is the business of `labels`.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gpt.metrics import Record
from gpt.plot import Curve, curve, smooth

CHANCE = 0.05  # a loss within this share of the first one has learned next to nothing
CLIMB_SIGMAS = 6.0  # as for spikes in OLMo-core
CLIMB_SHARE = 0.1  # of the whole fall; what lies below is no instability worth the name


@dataclass(frozen=True)
class Run:
    """What one training did. Losses are nats per token; curves hold finite values only."""

    lr: float
    seed: int
    train: Curve
    val: Curve
    grad_norms: tuple[float, ...]
    val_loss: float | None
    broke: str = ""

    @classmethod
    def from_records(cls, lr: float, seed: int, records: Sequence[Record]) -> "Run":
        """Reads the lines of a metrics.jsonl; `val_loss` is the last evaluation's."""
        last = next((r["val_loss"] for r in reversed(records) if r["kind"] == "eval"), None)
        broke = ""
        for record in records:
            if record["kind"] == "event" and record.get("event") == "diverged":
                what = str(record["what"])
                value = record["loss"] if what == "loss" else record["grad_norm"]
                broke = f"{what} {value} at step {int(record['step']) + 1:,}"
        if not broke and last is not None and not math.isfinite(last):
            broke = f"validation loss {last} at the end"
        return cls(
            lr=lr,
            seed=seed,
            train=curve(records, "train", "loss"),
            val=curve(records, "eval", "val_loss"),
            grad_norms=tuple(curve(records, "train", "grad_norm")[1]),
            val_loss=None if broke or last is None else float(last),
            broke=broke,
        )

    @property
    def start(self) -> float:
        """The first loss, which is about ln V; nan without a step."""
        return self.train[1][0] if self.train[1] else math.nan

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        pairs = list(zip(*self.val, strict=True))
        return min(pairs, key=lambda pair: pair[1]) if pairs else None

    @cached_property
    def lost(self) -> str:
        """How the run was lost, in words; empty if it was not."""
        if self.val_loss is None:
            return self.broke or "no evaluation"
        near_start = self.val_loss > (1 - CHANCE) * self.start
        strayed = max((abs(v - self.start) for v in smooth(*self.train)), default=0.0)
        if near_start and strayed > CHANCE * self.start:
            return f"ends at {self.val_loss:.2f}, began at {self.start:.2f}"
        return ""

    @property
    def idle(self) -> bool:
        """Whether it ended about where it began, without having been elsewhere."""
        return self.val_loss is not None and self.val_loss > (1 - CHANCE) * self.start

    @cached_property
    def climb(self) -> tuple[float, int]:
        """The largest rise of the smoothed loss above its lowest so far, and the step of its top.

        (0, 0) unless it stands out of the noise and counts beside the whole fall.
        """
        steps, losses = self.train
        smoothed = smooth(steps, losses)
        if len(smoothed) < 4:
            return 0.0, 0
        low, rise, top = smoothed[0], 0.0, 0
        for step, value in zip(steps, smoothed, strict=True):
            low = min(low, value)
            if value - low > rise:
                rise, top = value - low, step
        # The noise of one logged step, from differences of neighbours, which no trend disturbs;
        # 1.4826 makes a median deviation a standard one, and a difference has two of them.
        differences = [abs(b - a) for a, b in itertools.pairwise(losses)]
        sigma = 1.4826 / math.sqrt(2) * statistics.median(differences)
        width = 1 + 2 * max(1, len(losses) // 40)
        fall = max(smoothed) - min(smoothed)
        counts = rise > CLIMB_SIGMAS * sigma / math.sqrt(width) and rise > CLIMB_SHARE * fall
        return (rise, top) if counts else (0.0, 0)

    @cached_property
    def early_share(self) -> float:
        """Share of the training loss's whole fall that was done after a fifth of the run."""
        losses = self.train[1]
        if len(losses) < 10:
            return 0.0
        count = len(losses)
        early = statistics.fmean(losses[count * 3 // 20 : count // 4 + 1])
        end = statistics.fmean(losses[-count // 10 :])
        return (self.start - early) / (self.start - end) if end < self.start else 0.0

    @property
    def late_rise(self) -> float:
        """Share by which the validation loss ended above its lowest."""
        if self.val_loss is None or self.best is None or self.best[1] <= 0:
            return 0.0
        return self.val_loss / self.best[1] - 1
