"""The rules by which a rate and what goes with it follow the batch, the length and the size.

Formulas over plain numbers, and their sources as users read them; `scale` applies them.
"""

import math
from typing import Literal

HORIZON_EXPONENT = -0.32
# Above it a beta in the config would be rounded to 1, which never forgets.
HIGHEST_BETA = 1 - 1e-8

LINEAR = "Goyal et al. 2017 (arXiv:1706.02677), linear scaling rule"
SQRT = "Malladi et al. 2022 (arXiv:2205.10287), square root scaling rule"
HALF_LIFE = "Marek et al. 2025 (arXiv:2507.07101): β₂ keeps its half-life in tokens"
TIMESCALE = "B/(lr·λ·D) stays: Wang & Aitchison 2024 (2405.13698), Bergsma et al. 2025 (2505.13738)"
HORIZON = "Bjorck et al. 2024 (arXiv:2409.19913): lr goes with tokens^-0.32"
MUP = "muP, Yang et al. 2022 (arXiv:2203.03466)"
COMPLETEP = "CompleteP, Dey et al. 2025 (arXiv:2505.01618), table 1"


def scaled_rate(lr: float, batch_ratio: float, rule: Literal["linear", "sqrt"]) -> float:
    """The rate at `batch_ratio` times the batch. Source: as LINEAR and SQRT say."""
    return lr * (batch_ratio if rule == "linear" else math.sqrt(batch_ratio))


def scaled_beta2(beta1: float, beta2: float, batch_ratio: float) -> float:
    """β₂ at `batch_ratio` times the batch, so that as many tokens as before halve its memory.

    Source: Marek et al. 2025 (arXiv:2507.07101): β₂' = β₂^(B'/B), with β₁ unchanged. Deviation: β₂
    does not fall below β₁, under which the step remembers gradients that its scale has forgotten.
    """
    return min(HIGHEST_BETA, max(math.pow(beta2, batch_ratio), min(beta1, beta2)))


def scaled_decay(
    decay: float, *, batch_ratio: float, lr_ratio: float, tokens_ratio: float
) -> float:
    """λ that keeps B / (lr·λ·D), AdamW's memory as a share of the run. Source: as TIMESCALE."""
    return decay * batch_ratio / (lr_ratio * tokens_ratio)


def horizon_rate(lr: float, tokens_ratio: float) -> float:
    """The rate of a run of `tokens_ratio` times the tokens at the same batch. Source: HORIZON."""
    return lr * math.pow(tokens_ratio, HORIZON_EXPONENT)
