"""A history as the rules look at it: smoothed, with its noise and the parts of its rate.

Everything here is arithmetic on what was logged; what it means is the rules' business.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gpt.history import Column, History, Rows
from gpt.plan import Plan

AT_CHANCE = 0.02  # share of ln V around it
PEAK_SHARE = 0.7  # of the highest rate: where a run is at its full rate
HIGHEST = 1e6  # nats
MAD_TO_SIGMA = 1.4826
# Of GPT-2 (padded too), cl100k, o200k, LLaMA 1-3, Qwen, bytes, tiny Shakespeare's characters.
USUAL_VOCABULARIES = (
    50257,
    50304,
    100277,
    200019,
    32000,
    32768,
    65536,
    128256,
    151936,
    256,
    257,
    65,
)


@dataclass(frozen=True)
class View:
    """What the rules ask of a run so far. Steps are optimizer steps, losses nats per token."""

    history: History

    @cached_property
    def kept(self) -> Rows:
        """Rows of the train table whose loss is finite."""
        return np.isfinite(self.history.train["loss"])

    def column(self, name: str) -> Column:
        """A column of the train table, where the loss is finite."""
        return self.history.train[name][self.kept]

    @cached_property
    def steps(self) -> Column:
        """Logged steps."""
        return self.column("step")

    @cached_property
    def loss(self) -> Column:
        """The loss of each line: the mean since the line before where it was written."""
        single, mean = self.column("loss"), self.column("loss_mean")
        return np.where(np.isfinite(mean), mean, single)

    @cached_property
    def smooth(self) -> Column:
        """The loss, averaged over a window that grows with the run; looks to both sides alike."""
        return centred_mean(self.loss)

    @cached_property
    def sigma(self) -> float:
        """Noise of one line's loss, from differences of neighbours, which no trend disturbs."""
        if len(self.loss) < 8:
            return math.inf
        differences = np.abs(np.diff(self.loss[len(self.loss) // 4 :]))
        return float(MAD_TO_SIGMA * np.median(differences) / math.sqrt(2))

    @property
    def last(self) -> float:
        """The last logged step."""
        return float(self.steps[-1]) if len(self.steps) else 0.0

    @cached_property
    def total(self) -> float:
        """Steps of the whole run; those that were logged where nobody planned any."""
        return float(max(self.history.total_steps or 0, self.last, 1.0))

    @property
    def progress(self) -> float:
        """Share of the run that is done; 1 where no plan is known."""
        return self.last / self.total

    @cached_property
    def lr(self) -> Column:
        """The rate of each line; nan where unknown."""
        return self.column("lr")

    @cached_property
    def planned_peak(self) -> float | None:
        """The highest rate of the plan, or else of the log."""
        config = self.history.config
        if config is not None:
            return config.optimizer.lr
        known = self.lr[np.isfinite(self.lr)]
        return float(known.max()) if known.size and known.max() > 0 else None

    @cached_property
    def warmup_end(self) -> float:
        """The step at which the rate is full: by the plan, or where the log shows it."""
        config = self.history.config
        if config is not None and config.schedule.restart_step is None:
            return float(config.warmup_steps(round(self.total)))
        known = np.isfinite(self.lr)
        if not known.any():
            return 0.02 * self.total
        rates = np.where(known, self.lr, -1)
        return float(self.steps[int(np.argmax(rates >= 0.98 * rates.max()))])

    @cached_property
    def plan(self) -> Plan | None:
        """The schedule, where the config and the length are known."""
        config, total = self.history.config, self.history.total_steps
        if config is None or total is None:
            return None
        return Plan.from_config(config, total, strict=False)

    @cached_property
    def settled(self) -> Rows:
        """Lines after the warmup and the first steps of learning."""
        start = self.warmup_end + max(5.0, 0.02 * self.total)
        return self.steps > min(start, 0.5 * self.last)

    @cached_property
    def at_peak(self) -> Rows:
        """Settled lines whose rate is at least PEAK_SHARE of the highest."""
        if self.planned_peak is None:
            return self.settled
        return self.settled & ~(self.lr < PEAK_SHARE * self.planned_peak)

    def middle(self, name: str, rows: Rows) -> float | None:
        """Median of a column over some rows; None where it was not measured."""
        values = self.column(name)[rows]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if values.size else None

    def total_of(self, name: str, rows: Rows) -> float | None:
        """Sum of a column over some rows; None where it was not measured."""
        values = self.column(name)[rows]
        values = values[np.isfinite(values)]
        return float(values.sum()) if values.size else None

    @cached_property
    def start_loss(self) -> float:
        """The loss before anything was learned: ln V, or the first that was logged."""
        first = float(self.loss[0]) if len(self.loss) else math.nan
        return self.history.chance or first

    @cached_property
    def ignorance(self) -> float | None:
        """The loss of knowing the tokens' frequencies alone."""
        return self.history.unigram_entropy

    def step_at(self, rows: Rows) -> int:
        """The first step of some rows; 0 for none."""
        return int(self.steps[rows][0]) if rows.any() else 0


def centred_mean(values: Column) -> Column:
    """A moving average over a quarter of what lies before, at most a twentieth of all."""
    # A sum of what is larger would lose the others, and says no more.
    sums = np.concatenate([[0.0], np.cumsum(np.clip(values, -HIGHEST, HIGHEST))])
    index, half = np.arange(len(values)), half_widths(len(values))
    means: Column = (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
    return means


def half_widths(count: int) -> npt.NDArray[np.int64]:
    """How many lines to either side each average takes in: none at the ends."""
    index = np.arange(count)
    return np.minimum(np.minimum(index // 8, count - 1 - index), max(1, count // 40))


def theil_sen(steps: Column, values: Column, most: int = 200) -> tuple[float, float, float]:
    """Slope of a line through points with its 95 % interval: (slope, low, high) a step.

    Source: Sen 1968: the median of all pairs' slopes; the interval from Kendall's tau.
    """
    if len(steps) > most:
        parts = np.array_split(np.arange(len(steps)), most)
        steps = np.array([steps[part].mean() for part in parts])
        values = np.array([values[part].mean() for part in parts])
    count = len(steps)
    if count < 4:
        return 0.0, -math.inf, math.inf
    first, second = np.triu_indices(count, 1)
    apart = steps[second] != steps[first]  # a log may hold a step twice
    first, second = first[apart], second[apart]
    slopes = np.sort((values[second] - values[first]) / (steps[second] - steps[first]))
    if not slopes.size:
        return 0.0, -math.inf, math.inf
    half = 1.96 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((len(slopes) - half) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + half) / 2))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def is_a_guess(loss: float) -> bool:
    """Whether a loss is ln V for one of the vocabularies that most models have."""
    return any(abs(loss - math.log(size)) < 0.003 * loss for size in USUAL_VOCABULARIES)
