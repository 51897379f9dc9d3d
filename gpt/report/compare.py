"""Several runs against each other: which keys differ, how far the losses are apart, how sure.

Runs over the same text, seed and batch see the same batches at the same steps, so that the noise of
the batches leaves the difference of their losses at equal steps. What other seeds would change is
known only where there are runs with other seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gpt.history import Column, History, Table
from gpt.report.config_keys import (
    BATCHES,
    TOKENS,
    VALIDATION,
    Keys,
    differing_keys,
    keys_of,
    same_keys,
    seed_of,
    unique_names,
)
from gpt.report.intervals import LEAST_VALUES, NO_DIFFERENCE, Interval, Unit, series_interval
from gpt.report.seeds import SeedGap, Seeds, compare_seeds, group_labels

# Compared is the last quarter of the steps that both have; the last half where that is too short.
_LAST_PARTS = (0.25, 0.5)
COVERS = "those two at those steps, not what other seeds would give"


@dataclass(frozen=True)
class Gap:
    """Losses of one kind, `run` minus `against`, at equal steps of the last part."""

    what: Literal["evaluations", "training losses"]
    unit: Unit
    first_step: int
    last_step: int
    interval: Interval

    def words(self, run: str, against: str) -> str:
        """The gap in a sentence, with its interval."""
        gap = self.interval
        where = f"{gap.count} {self.what}, steps {self.first_step:,} to {self.last_step:,}"
        if not gap.is_known:
            return (
                f"{self.what}: {gap.mean:+.4g} {self.unit} in the mean ({where}): fewer than the "
                f"{LEAST_VALUES} that an interval needs, so nothing is sure"
            )
        ends = f"95 %: {gap.low:+.4g} to {gap.high:+.4g} {self.unit}"
        where += f", worth {gap.independent:.0f} independent ones"
        if not gap.excludes_zero:
            return f"{self.what}: {NO_DIFFERENCE}: {gap.mean:+.4g} ({ends}; {where})"
        side = "below" if gap.mean < 0 else "above"
        size = f"{abs(gap.mean):.4g} {self.unit}"
        return f"{self.what}: {run} is {size} {side} {against} ({ends}; {where})"

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "what": self.what,
            "unit": self.unit,
            "first_step": self.first_step,
            "last_step": self.last_step,
            **self.interval.record(),
        }


@dataclass(frozen=True)
class Pair:
    """Two runs against each other.

    Attributes:
        run: compared with `against`; a negative gap is in its favour.
        differing: the config keys that differ, with the value of `against` and that of `run`.
        same_batches: whether both saw the same batches at the same steps; None: nobody knows.
        gaps: the differences that could be taken.
        notes: what one has to know besides.
    """

    run: str
    against: str
    differing: dict[str, tuple[Any, Any]]
    same_batches: bool | None
    gaps: tuple[Gap, ...]
    notes: tuple[str, ...]

    def words(self) -> list[str]:
        """Each gap in a sentence, and the notes."""
        lines = [gap.words(self.run, self.against) for gap in self.gaps]
        none = "there is no step at which both have a finite loss to compare"
        return [*(lines or [none]), *self.notes]


@dataclass(frozen=True)
class Comparison:
    """Everything that is said of several runs at once.

    Attributes:
        names: of the runs, each one different.
        differing: the config keys in which any two differ, with the value of each run.
        unit: what losses are compared in.
        pairs: runs against the first one, or against the one of its group with the same seed.
        seeds: groups of two runs or more that differ by seed only.
        seed_gaps: those groups against each other.
        notes: what one has to know besides.
    """

    names: tuple[str, ...]
    differing: dict[str, tuple[Any, ...]]
    unit: Unit
    pairs: tuple[Pair, ...]
    seeds: tuple[Seeds, ...] = ()
    seed_gaps: tuple[SeedGap, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "unit": self.unit,
            "differing": {key: list(values) for key, values in self.differing.items()},
            "pairs": [
                {
                    "run": pair.run,
                    "against": pair.against,
                    "differing": sorted(pair.differing),
                    "same_batches": pair.same_batches,
                    "gaps": [gap.record() for gap in pair.gaps],
                    "covers": COVERS,
                    "notes": list(pair.notes),
                }
                for pair in self.pairs
            ],
            "seeds": [
                {
                    "label": group.label,
                    "runs": list(group.runs),
                    "seeds": list(group.seeds),
                    "step": group.step,
                    **group.interval.record(),
                }
                for group in self.seeds
            ],
            "seed_gaps": [
                {
                    "run": gap.label,
                    "against": gap.against,
                    "step": gap.step,
                    "paired_by_seed": gap.by_seed,
                    **gap.interval.record(),
                }
                for gap in self.seed_gaps
            ],
            "notes": list(self.notes),
        }


def compare(histories: Sequence[History]) -> Comparison:
    """Compares two runs or more; the first is what the others are held against."""
    names = unique_names(histories)
    keys = [keys_of(history) for history in histories]
    unit, notes = _unit(histories, keys)
    groups: dict[Any, list[int]] = {}
    for index, values in enumerate(keys):
        known = tuple((k, str(v)) for k, v in values.items() if k != "run.seed")
        groups.setdefault(known if values else index, []).append(index)
    members = list(groups.values())
    pairs = []
    for group in members:
        for index in group:
            against = _against(index, group, members[0], keys)
            if against is not None:
                two = (histories[index], histories[against])
                pairs.append(_pair(two, (names[index], names[against]), unit))
    labels = group_labels(members, keys, names)
    seeds, seed_gaps = compare_seeds(histories, names, keys, members, labels, unit)
    return Comparison(
        names=tuple(names),
        differing=differing_keys(keys),
        unit=unit,
        pairs=tuple(pairs),
        seeds=tuple(seeds),
        seed_gaps=tuple(seed_gaps),
        notes=tuple(notes),
    )


def _unit(histories: Sequence[History], keys: Sequence[Keys]) -> tuple[Unit, list[str]]:
    """Nats where all runs count the same tokens, else bits per byte; and what to say of it."""
    sizes = {history.vocab_size for history in histories if history.vocab_size}
    first = keys[0]
    same = [same_keys(first, other, TOKENS) for other in keys[1:]]
    trained = any(values.get("tokenizer.kind") == "bpe" for values in keys)
    texts = {str(values.get("data.source")) for values in keys if values}
    if len(sizes) > 1 or False in same or (trained and len(texts) > 1):
        return "bits per byte", [
            "the runs have different tokenizers: a token is not the same piece of text in each, so "
            "bits per byte are compared and not nats"
        ]
    if None in same and len(sizes) != 1:
        return "nats per token", [
            "whether all runs have the same tokenizer and see the same batches is not written in "
            "their logs; the losses are comparable only if so"
        ]
    return "nats per token", []


def _against(index: int, group: list[int], first: list[int], keys: Sequence[Keys]) -> int | None:
    """Which run of the first group one is held against: that of its seed, else the first."""
    if group is first:
        same = [i for i in first if i < index and seed_of(keys[i]) == seed_of(keys[index])]
        return same[0] if same else None
    same = [i for i in first if keys[i] and seed_of(keys[i]) == seed_of(keys[index])]
    return same[0] if same else first[0]


def _pair(two: tuple[History, History], names: tuple[str, str], unit: Unit) -> Pair:
    run, other = two
    keys, other_keys = keys_of(run), keys_of(other)
    same_batches = same_keys(keys, other_keys, BATCHES)
    if same_batches and _passed_over(run) != _passed_over(other):
        same_batches = False  # from there on, one of them is ahead in the text
    notes = []
    if same_batches is False:
        notes.append(
            "they saw different batches: their training losses are not paired, chance differs"
        )
    if same_keys(keys, other_keys, VALIDATION) is False:
        notes.append("they are validated on different text or another amount of it")
    common = min(run.last_step, other.last_step)
    if run.last_step != other.last_step:
        notes.append(
            f"they end at different steps ({run.last_step:,} and {other.last_step:,}): compared up "
            f"to step {common:,}, where the rate of the longer one may not have come down yet"
        )
    column = "val_loss" if unit == "nats per token" else "val_bpb"
    gaps = [_gap(run.evals, other.evals, column, common, unit)]
    if unit == "nats per token" and same_batches is not False:
        gaps.append(_gap(run.train, other.train, "loss", common, unit))
    return Pair(
        run=names[0],
        against=names[1],
        differing={k: (v[1], v[0]) for k, v in differing_keys([keys, other_keys]).items()},
        same_batches=same_batches,
        gaps=tuple(gap for gap in gaps if gap is not None),
        notes=tuple(notes),
    )


def _passed_over(run: History) -> list[int]:
    """The steps at which a batch was skipped."""
    names = ("nonfinite", "spike_skipped")
    return [int(e.get("step", 0)) for e in run.events if e.get("event") in names]


def _gap(run: Table, other: Table, column: str, end: int, unit: Unit) -> Gap | None:
    """The difference over the last part; None where no step has a finite loss of both."""
    steps, values = differences(run, other, column)
    kept = steps <= end
    steps, values = steps[kept], values[kept]
    late = steps > end
    for part in _LAST_PARTS:
        late = steps > (1 - part) * end
        if late.sum() >= LEAST_VALUES:
            break
    if not late.any():
        return None
    steps, values = steps[late], values[late]
    return Gap(
        what="training losses" if column == "loss" else "evaluations",
        unit=unit,
        first_step=int(steps[0]),
        last_step=int(steps[-1]),
        interval=series_interval(values),
    )


def differences(run: Table, other: Table, column: str) -> tuple[Column, Column]:
    """Steps that both have, and a column of `run` minus that of `other` there, finite ones."""
    steps, here, there = np.intersect1d(run["step"], other["step"], return_indices=True)
    values = run[column][here] - other[column][there]
    kept = np.isfinite(values)
    return steps[kept], values[kept]
