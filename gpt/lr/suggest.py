"""Published estimates of the peak rate for a run's size, each with its formula, range and source.

Every one was fitted or chosen on other text, at other batches, mostly for far larger models: they
are starting points that differ by a factor, which is why no single one is ever given.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from gpt.config import Config
from gpt.lr.recipes import RECIPES
from gpt.lr.size import RunSize, measure_run

MUON_NOTE = (
    "for muon no source has such an estimate; its updates have the length of AdamW's here "
    "(Liu et al. 2025, arXiv:2502.16982, eq. 4), so these are a first guess for it"
)
HORIZON_NOTE = (
    "a rate that was tuned on the same model in a run of other length: lr goes with tokens^-0.32 "
    "at a fixed batch (Bjorck et al. 2024, arXiv:2409.19913); gpt-lr scale --tokens does that"
)


@dataclass(frozen=True)
class Estimate:
    """One source's rate; `low` and `high` where it gives a band. None: it has no value here."""

    source: str
    formula: str
    range: str
    lr: float | None
    extrapolated: bool | None
    low: float | None = None
    high: float | None = None
    batch_tokens: int | None = None

    @property
    def ends(self) -> tuple[float, ...]:
        """The rates that this estimate adds to the spread."""
        found = (self.low, self.lr, self.high)
        return tuple(rate for rate in found if rate is not None)


@dataclass(frozen=True)
class Suggestions:
    """All estimates for a run, and what to know of them."""

    size: RunSize
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest of all rates; None if there are none."""
        rates = [rate for estimate in self.estimates for rate in estimate.ends]
        return (min(rates), max(rates)) if rates else None

    def as_json(self) -> dict[str, Any]:
        """What `gpt-lr suggest --json` prints."""
        return {
            "estimates": [asdict(estimate) for estimate in self.estimates],
            "spread": list(self.spread or (None, None)),
            "size": asdict(self.size),
            "notes": list(self.notes),
        }


def suggest(config: Config) -> Suggestions:
    """The estimates for the run that a config describes; none for SGD and Adafactor."""
    size, notes = measure_run(config)
    optimizer = config.optimizer.name
    if optimizer in ("sgd", "adafactor"):
        notes.append(
            f"no source fits: all published estimates are for Adam and AdamW, and {optimizer}'s "
            "rate is on another scale; gpt-lr find measures it"
        )
        return Suggestions(size, (), tuple(notes))
    if optimizer == "muon":
        notes.append(MUON_NOTE)
    if config.model.width_ratio != 1 or config.model.depth_ratio != 1:
        notes.append(
            "this model has muP keys: its lr is the one of the base size, while these estimates "
            "are for the standard model of its own size"
        )
    notes.append(HORIZON_NOTE)
    return Suggestions(size, tuple(estimates(size)), tuple(notes))


def estimates(size: RunSize) -> Iterator[Estimate]:
    """Every verified source in turn."""
    yield kaplan(size.matrices)
    yield deepseek(size.flops_per_token, size.tokens)
    yield step_law(size.matrices, size.tokens)
    yield porian(size.with_head)
    for family, source in (("GPT-3 ", _GPT3), ("Pythia ", _PYTHIA)):
        points = [(r.parameters, r.lr) for r in RECIPES if r.name.startswith(family)]
        yield from_table(size.parameters, points, source)
    yield from_table(size.parameters, CEREBRAS, _CEREBRAS)
    yield chapter(size.parameters)


_GPT3 = "GPT-3's models, Brown et al. 2020, table 2.1"
_PYTHIA = "Pythia's models, Biderman et al. 2023"
_CEREBRAS = "Cerebras-GPT's models, Dey et al. 2023 (arXiv:2304.03208), model cards"
# Parameters and rate of each model in standard parametrisation.
CEREBRAS = (
    (111e6, 6e-4),
    (256e6, 6e-4),
    (590e6, 2e-4),
    (1.3e9, 2e-4),
    (2.7e9, 2e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1.2e-4),
)


def kaplan(matrices: int) -> Estimate:
    """The rule of thumb behind the first scaling laws; N without embeddings.

    Source: Kaplan et al. 2020 (arXiv:2001.08361), eq. D.1.
    """
    lr = 0.003239 - 0.0001395 * math.log(matrices)
    return Estimate(
        source="Kaplan et al. 2020 (arXiv:2001.08361), eq. D.1",
        formula=f"0.003239 - 0.0001395 ln N, N = {matrices:,} without embeddings",
        range="768 to 1.5e9 parameters; breaks down above 1e10",
        lr=lr if lr > 0 else None,
        extrapolated=not 768 <= matrices <= 1.5e9,
    )


def deepseek(flops_per_token: int, tokens: int | None) -> Estimate:
    """Rate and batch from the compute C alone, which counts no embedding.

    Source: Bi et al. 2024 (DeepSeek LLM, arXiv:2401.02954), section 3.1, eq. 1.
    """
    source, range_ = "DeepSeek LLM 2024 (arXiv:2401.02954), eq. 1", "C from 1e17 to 2e19"
    if tokens is None:
        return _needs_tokens(source, "0.3118 C^-0.1250, C = FLOPs a token x tokens", range_)
    compute = float(flops_per_token) * tokens
    return Estimate(
        source=source,
        formula=f"0.3118 C^-0.1250, C = {flops_per_token:.4g} FLOPs x {tokens:,} = {compute:.3g}",
        range=range_,
        lr=0.3118 * compute**-0.1250,
        extrapolated=not 1e17 <= compute <= 2e19,
        batch_tokens=round(0.2920 * compute**0.3271),
    )


def step_law(matrices: int, tokens: int | None) -> Estimate:
    """Rate from parameters without embeddings and tokens, batch from tokens.

    Source: Li et al. 2025 (Step Law, arXiv:2503.04715); the range is that of its published runs.
    """
    source = "Step Law, Li et al. 2025 (arXiv:2503.04715)"
    range_ = "N from 215e6 to 1.07e9, D from 4e9 to 100e9"
    if tokens is None:
        return _needs_tokens(source, "1.79 N^-0.713 D^0.307", range_)
    return Estimate(
        source=source,
        formula=f"1.79 N^-0.713 D^0.307, N = {matrices:,} without embeddings, D = {tokens:,}",
        range=range_,
        lr=1.79 * matrices**-0.713 * tokens**0.307,
        extrapolated=not (214e6 <= matrices <= 1.075e9 and 4e9 <= tokens <= 100e9),
        batch_tokens=round(0.58 * tokens**0.571),
    )


def porian(with_head: int) -> Estimate:
    """Rate and batch from the parameters in matrix products, the head among them.

    Source: Porian et al. 2024 (arXiv:2406.19146), with the constants as Li et al. 2025
    (arXiv:2503.04715) restate them for tokens; the range is that of the fit in its published code.
    """
    return Estimate(
        source="Porian et al. 2024 (arXiv:2406.19146)",
        formula=f"3.7 N^-0.36, N = {with_head:,} with the head, without embeddings",
        range="fitted from 25e6 to 110e6 parameters",
        lr=3.7 * with_head**-0.36,
        extrapolated=not 25e6 <= with_head <= 110e6,
        batch_tokens=round(0.7576 * with_head**0.703),
    )


def from_table(parameters: int, points: Sequence[tuple[float, float]], source: str) -> Estimate:
    """The rate in a family's table: straight between its sizes in logarithms, flat outside."""
    first, last = points[0], points[-1]
    if parameters <= first[0]:
        lr, where = first[1], f"as for the smallest, {_size(first[0])}"
    elif parameters >= last[0]:
        lr, where = last[1], f"as for the largest, {_size(last[0])}"
    else:
        low, high = next((a, b) for a, b in pairwise(points) if a[0] <= parameters <= b[0])
        share = math.log(parameters / low[0]) / math.log(high[0] / low[0])
        lr = low[1] * (high[1] / low[1]) ** share
        where = f"between {_size(low[0])}: {low[1]:g} and {_size(high[0])}: {high[1]:g}"
    return Estimate(
        source=source,
        formula=f"its table at {parameters:,} parameters: {where}",
        range=f"{_size(first[0])} to {_size(last[0])} parameters",
        lr=lr,
        extrapolated=not first[0] <= parameters <= last[0],
    )


# Size, lowest and highest typical rate.
CHAPTER = ((1e8, 3e-4, 1e-3), (1e9, 1e-4, 3e-4), (1e10, 3e-5, 1e-4), (1e11, 1e-5, 3e-5))


def chapter(parameters: int) -> Estimate:
    """The band of the nearest size in the chapter's table, and its middle.

    Source: the chapter on learning rates, 17.7.2.
    """
    size, low, high = min(CHAPTER, key=lambda row: abs(math.log(parameters / row[0])))
    return Estimate(
        source="the chapter's table by size, 17.7.2",
        formula=f"middle of {low:g} to {high:g}, its band for about {_size(size)}",
        range="about 100M to 100B parameters",
        lr=math.sqrt(low * high),
        # "About": half an order of magnitude around the outermost sizes.
        extrapolated=not CHAPTER[0][0] / 10**0.5 <= parameters <= CHAPTER[-1][0] * 10**0.5,
        low=low,
        high=high,
    )


def _needs_tokens(source: str, formula: str, range_: str) -> Estimate:
    return Estimate(source, f"{formula}; the tokens of this run are open", range_, None, None)


def _size(parameters: float) -> str:
    for unit, value in (("B", 1e9), ("M", 1e6)):
        if parameters >= value:
            return f"{parameters / value:.3g}{unit}"
    return f"{parameters:,.0f}"
