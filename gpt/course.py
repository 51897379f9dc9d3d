"""The rate over a whole run whose plan was changed on the way: one plan a stretch. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpt.plan import Plan
from gpt.ratepolicy import RateChange


@dataclass(frozen=True)
class Stretch:
    """The part of a run, from `first_step` to the next stretch, that one plan holds for.

    `peaks` are the peak rates of the optimizer's groups, by name.
    """

    first_step: int
    plan: Plan
    peaks: dict[str, float]

    def rates(self, step: int) -> dict[str, float]:
        """The rate of each group that the plan has for a step, be it in the stretch or not."""
        return {name: self.plan.rate(step, peak) for name, peak in self.peaks.items()}


@dataclass(frozen=True)
class Course:
    """Stretches in the order of their steps; the first begins at step 0, the last ends the run."""

    stretches: tuple[Stretch, ...]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, by the last plan."""
        return self.stretches[-1].plan.total_steps

    def bounded(self) -> Iterator[tuple[Stretch, int]]:
        """Each stretch and its end, which is the first step that is not in it."""
        ends = [each.first_step for each in self.stretches[1:]] + [self.total_steps]
        yield from zip(self.stretches, ends, strict=True)

    def rate(self, step: int, group: str) -> float:
        """The rate that a step uses, or would use past the end, in a group."""
        at = next(each for each in reversed(self.stretches) if each.first_step <= step)
        return at.plan.rate(step, at.peaks[group])

    def peaks(self, group: str) -> tuple[float, ...]:
        """The group's peak in each stretch."""
        return tuple(each.peaks[group] for each in self.stretches)

    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first step and end (exclusive) of each part of the run that has any steps."""
        cut = [
            (name, max(first, stretch.first_step), min(last, end))
            for stretch, end in self.bounded()
            for name, first, last in stretch.plan.phases()
        ]
        return [(name, first, last) for name, first, last in cut if first < last]

    def highest(self, group: str) -> int:
        """The step at which a group's rate is highest, the first of them."""
        # Every plan is at its highest where one of its phases begins, or at the end of one.
        candidates = {step for _, first, end in self.phases() for step in (first, end - 1)}
        return max(sorted(candidates), key=lambda step: self.rate(step, group))


@dataclass(frozen=True)
class RateJump:
    """What a change does to the rates, by name of group; None where they cannot be known yet."""

    change: RateChange
    before: dict[str, float] | None
    after: dict[str, float] | None

    def line(self) -> str:
        """The change for people."""
        change = self.change
        if self.before is None or self.after is None:
            jump = "the rates are open until the text is tokenized"
        else:
            # One number for groups that share it, as most do.
            pairs: dict[tuple[float, float], list[str]] = {}
            for name, before in self.before.items():
                pairs.setdefault((before, self.after[name]), []).append(name)
            jump = ", ".join(
                f"{before:.2e} before, {after:.2e} after"
                + (f" ({' and '.join(names)})" if len(pairs) > 1 else "")
                for (before, after), names in pairs.items()
            )
        return (
            f"policy   {change.policy} from step {change.step:,} on: {jump}; {change.keys_text()}"
        )

    def values(self) -> dict[str, Any]:
        """The change for machines; `lr_before`, `lr_after`: of the group logged from then on."""
        before, after = self.before or {}, self.after or {}
        logged = next(iter(after), "")
        return {
            "policy": self.change.policy,
            "lr_before": before.get(logged),
            "lr_after": after.get(logged),
            "lrs_before": before,
            "lrs_after": after,
            "changed": self.change.model_dump(mode="json")["changed"],
        }
