"""Runs that differ by their seed alone: what another seed changes, and what is left besides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt.history import History, Table
from gpt.report.config_keys import Keys, differing_keys, seed_of
from gpt.report.intervals import (
    NO_DIFFERENCE,
    Interval,
    Unit,
    sample_interval,
    two_samples_interval,
)


@dataclass(frozen=True)
class Seeds:
    """Runs that differ by their seed alone, and the mean of their losses where all of them end."""

    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    step: int
    unit: Unit
    interval: Interval

    def words(self) -> str:
        """Mean and interval in a sentence."""
        mean = self.interval
        ends = f"95 %: {mean.low:.4g} to {mean.high:.4g}"
        seeds = ", ".join(str(seed) for seed in self.seeds)
        return (
            f"{self.label}: {mean.mean:.4f} {self.unit} at step {self.step:,}, mean of "
            f"{mean.count} seeds ({ends}; seeds {seeds})"
        )


@dataclass(frozen=True)
class SeedGap:
    """Two groups of seeds against each other; `by_seed`: seeds that both have were paired."""

    label: str
    against: str
    step: int
    unit: Unit
    by_seed: bool
    interval: Interval

    def words(self) -> str:
        """The gap in a sentence."""
        gap = self.interval
        how = f"{gap.count} seeds that both have" if self.by_seed else f"{gap.count} runs"
        if not gap.is_known:
            return f"{self.label} − {self.against}: {gap.mean:+.4g} {self.unit}; too few seeds"
        ends = f"95 %: {gap.low:+.4g} to {gap.high:+.4g} {self.unit}; {how}, step {self.step:,}"
        if not gap.excludes_zero:
            return f"{self.label} against {self.against}: {NO_DIFFERENCE}: {gap.mean:+.4g} ({ends})"
        side = "below" if gap.mean < 0 else "above"
        return f"{self.label} is {abs(gap.mean):.4g} {side} {self.against} ({ends})"


def group_labels(
    members: Sequence[list[int]], keys: Sequence[Keys], names: Sequence[str]
) -> list[str]:
    """What sets each group apart, in short; its first run's name where that would be long."""
    differing = [
        key for key in differing_keys([keys[group[0]] for group in members]) if key != "run.seed"
    ]
    labels = []
    for group in members:
        values = keys[group[0]]
        short = ", ".join(f"{key} {values.get(key)}" for key in differing)
        fits = differing and len(differing) <= 2 and len(short) <= 60 and values
        labels.append(short if fits else names[group[0]])
    return labels


def compare_seeds(
    histories: Sequence[History],
    names: Sequence[str],
    keys: Sequence[Keys],
    members: Sequence[list[int]],
    labels: Sequence[str],
    unit: Unit,
) -> tuple[list[Seeds], list[SeedGap]]:
    """Groups of seeds, and each against the first of them."""
    column = "val_loss" if unit == "nats per token" else "val_bpb"
    several = [
        (label, group)
        for label, group in zip(labels, members, strict=True)
        if len({seed_of(keys[i]) for i in group}) > 1 and keys[group[0]]
    ]
    step = _last_common_step([histories[i] for _, group in several for i in group], column)
    if not several or step is None:
        return [], []
    seeds, ends = [], []
    for label, group in several:
        # Two runs of one seed are one measurement.
        end = {seed_of(keys[i]): _value_at(histories[i].evals, column, step) for i in group}
        ends.append(end)
        seeds.append(
            Seeds(
                label=label,
                runs=tuple(names[i] for i in group),
                seeds=tuple(end),
                step=step,
                unit=unit,
                interval=sample_interval(np.array(list(end.values()))),
            )
        )
    gaps = [
        _seed_gap(seeds[0], seeds[number], ends[0], ends[number]) for number in range(1, len(seeds))
    ]
    return seeds, gaps


def _seed_gap(
    base: Seeds, other: Seeds, base_ends: dict[int, float], ends: dict[int, float]
) -> SeedGap:
    """`other` minus `base`, seed by seed where they share at least two."""
    shared = [seed for seed in ends if seed in base_ends]
    if len(shared) > 1:
        interval = sample_interval(np.array([ends[seed] - base_ends[seed] for seed in shared]))
    else:
        values = [np.array(list(each.values())) for each in (base_ends, ends)]
        interval = two_samples_interval(*values)
    return SeedGap(other.label, base.label, base.step, base.unit, len(shared) > 1, interval)


def _last_common_step(histories: Sequence[History], column: str) -> int | None:
    """The last step at which all runs have a finite evaluation."""
    steps = [set(h.evals["step"][np.isfinite(h.evals[column])].astype(int)) for h in histories]
    shared = set.intersection(*steps) if steps else set()
    return int(max(shared)) if shared else None


def _value_at(evals: Table, column: str, step: int) -> float:
    return float(evals[column][evals["step"] == step][-1])
