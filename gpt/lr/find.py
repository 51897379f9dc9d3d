"""The learning-rate finder: a ramp to bracket the rate, short runs to decide it.

How it decides, and how well, is told in docs/lr-find.md. Writes no file; touches no state of the
caller's.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from statistics import median_high
from typing import Any

from torch import Tensor

from gpt.config import Config
from gpt.data import TokenData
from gpt.lr.bracket import Bracket, read_ramp
from gpt.lr.decide import TOLERANCE, Minimum, Posterior, horizon_power, minimum
from gpt.lr.trial import Laboratory, Trial

# A ramp over six decades; SGD's rates are larger, since nothing divides them by the gradient.
RAMP = {"sgd": (1e-4, 1e2)}
DEFAULT_RAMP = (1e-6, 1.0)
RAMP_SHARE, RAMP_MIN_STEPS, RAMP_MAX_STEPS, RAMP_SEEDS = 0.2, 12, 250, 3
# Trainings of fewer steps are not runs any more.
MIN_STEPS = 4
# A round of trials is so many times longer than the one before.
STRIDE, MAX_ROUNDS = 4, 4
# Runs must be this long for each seed that is added.
SEED_PAYS_STEPS = 15
# Three rates bracket a minimum at best; most rounds need a fourth.
RATES = 4
# The best rate of a short run lies below the lowest point of a ramp by about this many octaves.
RAMP_LAG_OCTAVES = 1.0
MAX_RATES = 9


@dataclass(frozen=True)
class RampRun:
    """One ramp: the rate and loss of each step."""

    seed: int
    rates: list[float]
    losses: list[float]


@dataclass
class Found:
    """What the finder saw and decided. `lr` is None where it gives no answer; `reason` says why."""

    lr: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""
    ramps: list[RampRun] = field(default_factory=list)
    bracket: Bracket | None = None
    rounds: list[tuple[int, list[Trial]]] = field(default_factory=list)
    minima: list[tuple[int, Minimum]] = field(default_factory=list)
    steps: float = 0.0
    total_steps: int = 0
    seconds: float = 0.0

    @property
    def share_of_training(self) -> float:
        """What the search cost, as a share of the steps of the run."""
        return self.steps / self.total_steps

    def answer(self) -> dict[str, Any]:
        """What `lr_find.json` holds: all that is needed to draw the picture again."""
        return {
            "lr": self.lr,
            "interval": None if self.interval is None else list(self.interval),
            "reason": self.reason,
            "bracket": [
                {"lr": lr, "loss": _finite(loss), "seed": ramp.seed}
                for ramp in self.ramps
                for lr, loss in zip(ramp.rates, ramp.losses, strict=True)
            ],
            "trials": [
                {"lr": t.lr, "seed": t.seed, "loss": _finite(t.loss), "steps": steps}
                for steps, trials in self.rounds
                for t in trials
            ],
            "minima": [
                {"steps": steps, "lr": 2**m.octave, "inside": m.inside} for steps, m in self.minima
            ],
            "ramp": None if self.bracket is None else asdict(self.bracket),
            "total_steps": self.total_steps,
            "steps": round(self.steps, 1),
            "seconds": round(self.seconds, 2),
            "share_of_training": round(self.share_of_training, 4),
        }

    def lines(self) -> list[str]:
        """The answer for people."""
        cost = (
            f"cost     {self.steps:.0f} steps, {100 * self.share_of_training:.0f} % of the run, "
            f"in {self.seconds:.0f} s"
        )
        if self.lr is None or self.interval is None:
            return ["lr       no answer", f"why      {self.reason}", cost]
        low, high = self.interval
        return [
            f"lr       {self.lr:.2g}",
            f"interval {low:.2g} to {high:.2g} (four times in five the best rate lies inside)",
            f"why      {self.reason}",
            cost,
        ]


def find(
    config: Config,
    data: TokenData,
    *,
    budget_steps: float,
    weights: dict[str, Tensor] | None = None,
    on_cost: Callable[[float], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Found:
    """Looks for the peak rate of the run that `config` describes, at the cost of so many steps.

    `weights` are those to begin from, for a model that is not new; it is copied from, never
    trained. `on_cost` hears the cost of each thing done, in steps; `on_stage` what begins.
    """
    started = time.perf_counter()
    laboratory = Laboratory(config, data, weights=weights, on_cost=on_cost)
    found = Found(total_steps=laboratory.total_steps)
    search = _Search(config, laboratory, found, budget_steps, on_stage)
    search.run()
    found.steps = laboratory.steps
    found.seconds = time.perf_counter() - started
    return found


class _Search:
    """One search, stage by stage; `found` collects what it sees."""

    def __init__(
        self,
        config: Config,
        laboratory: Laboratory,
        found: Found,
        budget: float,
        on_stage: Callable[[str], None] | None,
    ) -> None:
        self.config, self.laboratory, self.found = config, laboratory, found
        self.budget = budget
        self.on_stage = on_stage or (lambda text: None)
        self.seed = config.run.seed

    @property
    def left(self) -> float:
        return self.budget - self.laboratory.steps

    def run(self) -> None:
        found = self.found
        if not self.is_enough(self.budget):
            found.reason = self.too_short()
            return
        bracket = self.ramps(_ramp_steps(self.budget))
        if bracket is None:
            found.reason = (
                "the loss did not fall anywhere on the ramp: check the data, the model's "
                "initialisation and train.grad_clip"
            )
            return
        posterior = Posterior(horizon_power(self.config.optimizer.name, self.config.model.qk_norm))
        centre = math.log2(bracket.lowest) - RAMP_LAG_OCTAVES
        lengths = self.lengths(self.left)
        if not lengths:
            found.reason = (
                f"the ramp took {self.laboratory.steps:.0f} steps, some of which fp16 skipped, and "
                f"the {self.left:.0f} that are left are too few to compare rates: give a larger "
                "--budget"
            )
            return
        for index, (steps, seeds) in enumerate(lengths):
            if index:
                centre = round(2 * posterior.octave(steps)) / 2
            lowest = self.round(steps, seeds, centre, last=index == len(lengths) - 1)
            posterior.add(steps, lowest, seeds)
        self.decide(posterior)

    def lengths(self, budget: float) -> list[tuple[int, int]]:
        """Steps and seeds of each round of trials, the shortest first, within `budget` steps."""
        most = min(self.laboratory.total_steps, int(budget))
        for seeds in (3, 2, 1):
            # A longer run tells more than another seed, up to a point.
            least = MIN_STEPS if seeds == 1 else SEED_PAYS_STEPS * seeds
            for last in range(most, least - 1, -1):
                rounds = [last]
                while rounds[0] // STRIDE >= MIN_STEPS and len(rounds) < MAX_ROUNDS:
                    rounds.insert(0, rounds[0] // STRIDE)
                if RATES * seeds * sum(map(self.laboratory.cost, rounds)) <= budget:
                    return [(steps, seeds) for steps in rounds]
        return []

    def is_enough(self, budget: float) -> bool:
        """Whether so many steps pay for a ramp and the shortest round of trials."""
        if self.laboratory.total_steps < MIN_STEPS:
            return False
        return RATES * self.laboratory.cost(MIN_STEPS) <= budget - _ramp_steps(budget)

    def too_short(self) -> str:
        """What the least budget is, and the percentage that suffices as it is typed."""
        total = self.laboratory.total_steps
        if total < MIN_STEPS:
            return f"a run of {total} steps is too short to search; train for {MIN_STEPS} or more"
        least = next(steps for steps in count(MIN_STEPS) if self.is_enough(steps))
        percents = count(math.ceil(100 * least / total))
        percent = next(each for each in percents if self.is_enough(each * 0.01 * total))
        return (
            f"{int(self.budget)} steps are too few to compare rates: the least is {least}; give "
            f"--budget {percent}% (of this run's {total})"
        )

    def ramps(self, steps: int) -> Bracket | None:
        """Ramps over the whole range, with as many seeds as a quarter of the budget allows."""
        self.on_stage("bracket")
        low, high = RAMP.get(self.config.optimizer.name, DEFAULT_RAMP)
        seeds = min(RAMP_SEEDS, max(1, int(0.25 * self.budget / steps)))
        brackets = []
        for index in range(seeds):
            rates, trial = self.laboratory.ramp(low, high, steps, self.seed + index)
            self.found.ramps.append(RampRun(self.seed + index, rates, list(trial.losses)))
            seen = read_ramp(rates, trial.losses)
            if seen is not None:
                brackets.append(seen)
        if not brackets:
            return None
        self.found.bracket = Bracket(
            median_high(b.steepest for b in brackets),
            median_high(b.lowest for b in brackets),
            min((b.broken for b in brackets if b.broken is not None), default=None),
        )
        return self.found.bracket

    def round(self, steps: int, seeds: int, centre: float, *, last: bool) -> Minimum:
        """Trials of one length at rates two times apart, until the lowest lies among them."""
        self.on_stage(f"decide: {steps} steps")
        trials: list[Trial] = []
        losses: dict[float, list[float]] = {}
        price = seeds * self.laboratory.cost(steps)

        def at(octave: float) -> None:
            runs = [self.laboratory.run(2**octave, steps, self.seed + s) for s in range(seeds)]
            trials.extend(runs)
            losses[octave] = [run.loss for run in runs]

        self.found.rounds.append((steps, trials))
        for offset in (-1.0, 0.0, 1.0):
            at(centre + offset)
        lowest = minimum(losses)
        while not lowest.inside and len(losses) < MAX_RATES and (self.left >= price or not last):
            at(min(losses) - 1 if lowest.at_bottom else max(losses) + 1)
            lowest = minimum(losses)
        self.found.minima.append((steps, lowest))
        return lowest

    def decide(self, posterior: "Posterior") -> None:
        """The pick for the whole run, and the interval."""
        found, total = self.found, self.laboratory.total_steps
        usable = [(steps, lowest) for steps, lowest in found.minima if lowest.usable]
        if not usable:
            found.reason = self.lies_beyond()
            return
        steps, lowest = usable[-1]
        trials = found.rounds[-1][1]
        start = max(trial.losses[0] for trial in trials if trial.losses)
        if min(trial.loss for trial in trials) > (1 - TOLERANCE) * start:
            found.reason = (
                f"no rate brought the loss of {start:.2f} down by {TOLERANCE:.0%} in "
                f"{found.rounds[-1][0]} steps: check the data, or give a larger --budget"
            )
            return
        octave, doubt = posterior.octave(total), posterior.doubt(total)
        found.lr = _two_digits(2**octave)
        found.interval = (_two_digits(2 ** (octave - doubt)), _two_digits(2 ** (octave + doubt)))
        found.reason = (
            f"runs of {steps} steps end lowest around {2**lowest.octave:.2g}; the best rate falls "
            f"about as steps^-{posterior.power:.2f}, which makes {found.lr:.2g} for {total:,} steps"
        )

    def lies_beyond(self) -> str:
        """On which side of the rates that were tried the best one lies."""
        steps, lowest = self.found.minima[-1]
        rates = {trial.lr for trial in self.found.rounds[-1][1]}
        end, side = (min(rates), "below") if lowest.at_bottom else (max(rates), "above")
        more = "; give a larger --budget" if len(rates) < MAX_RATES else ""
        return (
            f"in runs of {steps} steps the loss was lowest at the end of what was tried, "
            f"{end:.2e}; the best rate lies {side} it{more}"
        )


def _ramp_steps(budget: float) -> int:
    """The steps of a ramp within `budget`. Whole steps count: none more leaves less for trials."""
    return min(max(RAMP_MIN_STEPS, round(RAMP_SHARE * int(budget))), RAMP_MAX_STEPS)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")
