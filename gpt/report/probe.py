"""Probes: a run trained on for a little from a checkpoint, in memory, to see what limits it.

cooldown  the rate comes down to 0, beside a branch that goes on at the unchanged rate
double    besides, the same cooldown from twice the rate

All branches see the same batches. Cooled branches are compared since a higher rate is worse at
first for its noise alone, and cooling down takes that away (docs/probes.md).

Sources: Hägele et al. 2024 (arXiv:2405.18392) for the cooldown, 1 - sqrt(x); Wu et al. 2018
(arXiv:1803.02021) for what short trials get wrong of a rate.
"""

import math
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from tqdm import tqdm

from gpt.configfile import load_config
from gpt.device import set_threads
from gpt.errors import UserError, say
from gpt.history import History, finite, history_of
from gpt.lr.trial import untouched_generators
from gpt.malloc import keep_freed_memory
from gpt.metrics import duration, read_metrics
from gpt.report.branches import Bench, Branch, Difference, Losses
from gpt.report.evidence import Evidence, evidence_of
from gpt.report.limits import Verdict, judge
from gpt.report.origin import open_bench, plan_of
from gpt.report.remedies import Standing, next_command
from gpt.rundir import checkpoint_folders, step_of

Kind = Literal["cooldown", "double"]

SHARE = 0.05  # of the steps done, that a branch takes
LEAST_STEPS = 20
FEWEST_STEPS = 8  # that may be asked for
# The lowest rate, as a share of its peak, that a probe begins from.
LOWEST = {"cooldown": 0.5, "double": 0.2}
BRANCHES = {
    "control": "going on at that rate",
    "cooled": "cooled down to 0",
    "double": "cooled down to 0 from twice the rate",
}
_EVALUATION_COST = 1 / 3  # of a step with as many tokens: it goes forward only
_WIDTH, _INDENT = 100, " " * 9


@dataclass(frozen=True)
class Probe:
    """What a probe did, found and cost. Losses are nats per token.

    Attributes:
        kind: which probe.
        run: the run's directory.
        checkpoint: what it began from.
        step: steps that the run had done there.
        newest: step of the run's newest checkpoint.
        rate: the logged group's rate there.
        rate_share: the same as a share of its peak.
        steps: steps of each branch.
        before: the checkpoint's validation losses.
        branches: by name, as in BRANCHES; `double` only in that kind.
        evidence: what the verdict rests on; None where the run's own rate broke the numbers.
        verdict: what limits the run.
        next: a command to type.
        seconds: what it took.
    """

    kind: Kind
    run: Path
    checkpoint: Path
    step: int
    newest: int
    rate: float
    rate_share: float
    steps: int
    before: Losses
    branches: dict[str, Branch]
    evidence: Evidence | None
    verdict: Verdict
    next: str
    seconds: float

    def lines(self) -> list[str]:
        """The answer for a terminal."""
        what = f"{self.kind}, from step {self.step:,}: {self.steps} steps a branch, in memory"
        at = f"rate {self.rate:.2e}, {self.rate_share:.0%} of its peak"
        lines = [f"probe    {what}"]
        if self.newest > self.step:
            lines.append(
                f"{_INDENT}the run stands at {self.newest:,}; since then its rate came down"
            )
        lines.append(f"val      {self.before.mean:.4f} at the checkpoint ({at})")
        for name, branch in self.branches.items():
            lines.append(f"{_INDENT}{self._outcome(branch)} {BRANCHES[name]}")
        if self.evidence is not None:
            lines += self._differences(self.evidence)
        said = f"{self.verdict.limit.replace('_', ' ')}. {' '.join(self.verdict.reasons)}"
        lines += textwrap.wrap(f"verdict  {said}", _WIDTH, subsequent_indent=_INDENT)
        return [*lines, f"next     {self.next}", f"cost     {self._cost()}"]

    def _outcome(self, branch: Branch) -> str:
        if branch.val is None:
            return f"broke after {len(branch.losses)} steps"
        return f"{branch.val.mean:.4f} ({branch.val.mean - self.before.mean:+.4f})"

    def _differences(self, found: Evidence) -> list[str]:
        lines = [f"gain     {found.gain} nats by cooling down, over going on at that rate"]
        if found.win is not None and found.train_win is not None:
            lines += [
                f"double   {found.win} nats by twice the rate, both cooled down",
                f"{_INDENT}{found.train_win} of the training loss, over the second half",
            ]
        blocks, tokens = len(self.before.tokens), self.before.tokens.sum()
        note = (
            f"(± a standard error: over {blocks} blocks of the {tokens:,.0f} validation tokens, "
            "paired, and for another order of the batches as much as it changed on small runs)"
        )
        return lines + textwrap.wrap(
            note, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT
        )

    def _cost(self) -> str:
        steps = sum(len(branch.losses) for branch in self.branches.values())
        evaluations = 1 + sum(branch.val is not None for branch in self.branches.values())
        return f"{steps} steps and {evaluations} evaluations, {duration(self.seconds)}"

    def json(self) -> dict[str, Any]:
        """The answer for programs; a number that does not exist is None."""
        found = self.evidence
        val: dict[str, float | None] = {"checkpoint": _number(self.before.mean)}
        for name, branch in self.branches.items():
            val[name] = None if branch.val is None else branch.val.mean
        differences = {
            name: _plain(getattr(found, name, None))
            for name in ("drift", "total", "gain", "win", "train_win", "gap")
        }
        return {
            "kind": self.kind,
            "run": str(self.run),
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "newest_step": self.newest,
            "steps": self.steps,
            "lr": self.rate,
            "lr_share": self.rate_share,
            "val_loss": val,
            "val_tokens": int(self.before.tokens.sum()),
            "val_blocks": len(self.before.tokens),
            "train_loss": {name: list(branch.losses) for name, branch in self.branches.items()},
            **differences,
            "noise_share": _number(found.noise_share) if found else None,
            "epochs": found.epochs if found else None,
            "limit": self.verdict.limit,
            "reasons": list(self.verdict.reasons),
            "next": self.next,
            "seconds": round(self.seconds, 3),
        }


def probe(run: Path, kind: Kind, steps: int | None = None) -> Probe:
    """Trains branches from a checkpoint of the run and says what limits it.

    A branch takes `steps`, or a twentieth of the steps done. What it will cost is said before, on
    stderr. Nothing in the run's directory changes. Raises UserError where no checkpoint will do,
    and where the text has changed.
    """
    if steps is not None and steps < FEWEST_STEPS:
        raise UserError(f"--steps {steps}: too few to see anything; give {FEWEST_STEPS} or more")
    set_threads()
    with untouched_generators():
        bench = open_bench(run, LOWEST[kind])
        keep_freed_memory(not bench.config.train.activation_checkpointing)
        length = steps or max(LEAST_STEPS, round(SHARE * bench.step))
        names = [name for name in BRANCHES if kind == "double" or name != "double"]
        history = history_of(read_metrics(run)).until(bench.step)
        meter = _Meter(bench, length, names)
        for line in meter.announcement(run, kind, history):
            say(line)
        with meter:
            before = bench.validate(meter.tokens)
            branches = {
                name: bench.branch(_factors(name, length), meter.stage(name), meter.tokens)
                for name in names
            }
    evidence = evidence_of(bench, length, before, branches, history)
    verdict = _broken(branches) if evidence is None else judge(evidence)
    standing = _standing(run, bench)
    return Probe(
        kind=kind,
        run=run,
        checkpoint=bench.folder,
        step=bench.step,
        newest=standing.newest,
        rate=bench.rates[0],
        rate_share=bench.plan.factor(bench.step),
        steps=length,
        before=before,
        branches=branches,
        evidence=evidence,
        verdict=verdict,
        next=next_command(standing, verdict.remedy, length),
        seconds=meter.seconds,
    )


def _standing(run: Path, bench: Bench) -> Standing:
    """The run as it stands: its schedule may be another one than the checkpoint's by now."""
    config = load_config(run / "config.yaml")
    plan = plan_of(config, bench.data)
    return Standing(run, config, plan, step_of(checkpoint_folders(run)[-1]))


def _factors(name: str, steps: int) -> list[float]:
    """The rate of each step of a branch, as a share of the checkpoint's."""
    if name == "control":
        return [1.0] * steps
    top = 2.0 if name == "double" else 1.0
    # Source: Hägele et al. 2024, the 1-sqrt cooldown; the step after the last one would be at 0.
    return [top * (1 - math.sqrt((index + 1) / (steps + 1))) for index in range(steps)]


def _broken(branches: dict[str, Branch]) -> Verdict:
    steps = min(len(branches[name].losses) for name in ("control", "cooled"))
    return Verdict(
        "noise",
        "lower",
        (f"The run's own rate breaks the numbers within {steps + 1} steps: it is too high.",),
    )


class _Meter:
    """The cost of a probe: told before, shown while it grows, and counted."""

    def __init__(self, bench: Bench, steps: int, names: Sequence[str]) -> None:
        """Takes the steps of each of the branches."""
        self._tokens_per_step = bench.config.tokens_per_step
        self._steps, self._branches = steps, len(names)
        evaluations = (len(names) + 1) * bench.val_tokens / self._tokens_per_step
        self._work = steps * len(names) + evaluations * _EVALUATION_COST
        self._step = bench.step
        self.seconds = 0.0

    def announcement(self, run: Path, kind: Kind, history: History) -> list[str]:
        """What will be done and what it costs, by the speed that the run logged."""
        speeds = finite(history.train["step"], history.train["tokens_per_s"])[1][-20:]
        price = ""
        if len(speeds) and (speed := float(statistics.median(speeds))) > 0:
            seconds = self._work * self._tokens_per_step / speed
            price = f", about {duration(seconds)} at the speed of its log"
        return [
            f"probe    {kind} of {run} from step {self._step:,}, which is only read: "
            f"{self._branches} x {self._steps} steps and {self._branches + 1} evaluations{price}"
        ]

    def stage(self, name: str) -> Callable[[], None]:
        """Says which branch comes next; returns what is to be called for each step."""
        if self._bar.disable:
            say(f"         {self._steps} steps {BRANCHES[name]}")
        else:
            self._bar.set_description(f"         {name}")
        return lambda: self._add(1)

    def tokens(self, count: int) -> None:
        """Counts tokens that were evaluated."""
        self._add(count / self._tokens_per_step * _EVALUATION_COST)

    def _add(self, work: float) -> None:
        self._bar.update(min(work, self._work - self._bar.n))

    def __enter__(self) -> Self:
        form = "{desc} |{bar:20}| {elapsed}"
        self._bar: tqdm[NoReturn] = tqdm(
            total=self._work, leave=False, disable=None, bar_format=form
        )
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self.seconds = time.perf_counter() - self._started


def _plain(difference: Difference | None) -> dict[str, float | None] | None:
    if difference is None:
        return None
    return {"value": _number(difference.value), "error": _number(difference.error)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
