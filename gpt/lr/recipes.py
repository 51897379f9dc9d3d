"""Published training recipes as data, and the rates that are usual for an optimizer and a size.

Holds numbers and their sources; what to make of them is `lint`'s business.
"""

import math
from dataclasses import dataclass

_GPT1 = "Radford et al. 2018 (GPT-1), section 4.1"
_GPT3 = "Brown et al. 2020 (GPT-3), table 2.1 and appendix B"
_LLAMA = "Touvron et al. 2023 (LLaMA), table 2 and section 2.3"
_PYTHIA = "Biderman et al. 2023 (Pythia), README of EleutherAI/pythia"
_TINYLLAMA = "Zhang et al. 2024 (TinyLlama), README and pretrain/tinyllama.py"
_NANOGPT = "Karpathy, nanoGPT: train.py, config/train_gpt2.py"
_NANOGPT_CHAR = "Karpathy, nanoGPT: config/train_shakespeare_char.py, README"


@dataclass(frozen=True)
class Recipe:
    """How a model was trained: sizes in parameters, batches in tokens, warmups in tokens.

    `preset` is the `model.preset` of that very model, if there is one here; `dropout` and `epochs`
    are given where a text was read again and again.
    """

    name: str
    parameters: float
    lr: float
    batch_tokens: int
    warmup_tokens: float
    total_tokens: float | None
    source: str
    weight_decay: float = 0.1
    betas: tuple[float, float] | None = (0.9, 0.95)
    preset: str | None = None
    dropout: float = 0.0
    epochs: float = 1.0


def _gpt3(
    name: str, parameters: float, lr: float, batch_tokens: float, preset: str | None
) -> Recipe:
    return Recipe(name, parameters, lr, int(batch_tokens), 375e6, 300e9, _GPT3, preset=preset)


def _llama(parameters: float, lr: float, total_tokens: float) -> Recipe:
    name = f"LLaMA {parameters / 1e9:g}B"
    return Recipe(name, parameters, lr, 4_000_000, 2000 * 4e6, total_tokens, _LLAMA)


def _pythia(name: str, parameters: float, lr: float) -> Recipe:
    batch = 1024 * 2048
    return Recipe(f"Pythia {name}", parameters, lr, batch, 1430 * batch, 143_000 * batch, _PYTHIA)


RECIPES = (
    Recipe(
        "GPT-1", 117e6, 2.5e-4, 64 * 512, 2000 * 64 * 512, None, _GPT1,
        weight_decay=0.01, betas=None, dropout=0.1, epochs=100,
    ),
    Recipe(
        "GPT-2 124M by nanoGPT", 124e6, 6e-4, 480 * 1024, 2000 * 480 * 1024, 600_000 * 480 * 1024,
        _NANOGPT, preset="gpt2-124m",
    ),
    _gpt3("GPT-3 125M", 125e6, 6e-4, 0.5e6, "gpt3-125m"),
    _gpt3("GPT-3 350M", 350e6, 3e-4, 0.5e6, "gpt3-350m"),
    _gpt3("GPT-3 760M", 760e6, 2.5e-4, 0.5e6, "gpt3-760m"),
    _gpt3("GPT-3 1.3B", 1.3e9, 2e-4, 1e6, "gpt3-1.3b"),
    _gpt3("GPT-3 2.7B", 2.7e9, 1.6e-4, 1e6, None),
    _gpt3("GPT-3 6.7B", 6.7e9, 1.2e-4, 2e6, None),
    _gpt3("GPT-3 13B", 13e9, 1e-4, 2e6, None),
    _gpt3("GPT-3 175B", 175e9, 0.6e-4, 3.2e6, None),
    _llama(6.7e9, 3e-4, 1e12),
    _llama(13e9, 3e-4, 1e12),
    _llama(32.5e9, 1.5e-4, 1.4e12),
    _llama(65.2e9, 1.5e-4, 1.4e12),
    _pythia("14M", 14e6, 1e-3),
    _pythia("31M", 31e6, 1e-3),
    _pythia("70M", 70e6, 1e-3),
    _pythia("160M", 160e6, 6e-4),
    _pythia("410M", 410e6, 3e-4),
    _pythia("1B", 1e9, 3e-4),
    _pythia("1.4B", 1.4e9, 2e-4),
    _pythia("2.8B", 2.8e9, 1.6e-4),
    _pythia("6.9B", 6.9e9, 1.2e-4),
    _pythia("12B", 12e9, 1.2e-4),
    Recipe(
        "TinyLlama 1.1B", 1.1e9, 4e-4, 1024 * 2048, 2000 * 1024 * 2048, 3e12, _TINYLLAMA,
        preset="llama-1.1b", epochs=3.2,
    ),
    Recipe(
        "nanoGPT, characters of Shakespeare, GPU", 10.6e6, 1e-3, 64 * 256, 100 * 64 * 256,
        5000 * 64 * 256, _NANOGPT_CHAR, betas=(0.9, 0.99), dropout=0.2, epochs=82,
    ),
    Recipe(
        "nanoGPT, characters of Shakespeare, CPU", 0.8e6, 1e-3, 12 * 64, 100 * 12 * 64,
        2000 * 12 * 64, _NANOGPT_CHAR, betas=(0.9, 0.99), epochs=1.5,
    ),
)  # fmt: skip


def recipe_of_preset(preset: str | None) -> Recipe | None:
    """How the model behind a `model.preset` was trained, where that was published."""
    return next((r for r in RECIPES if preset is not None and r.preset == preset), None)


# AdamW's rate by size: Pythia's up to 70M parameters, GPT-3's above.
SIZE_TABLE = (
    (70e6, 1e-3),
    (125e6, 6e-4),
    (350e6, 3e-4),
    (760e6, 2.5e-4),
    (1.3e9, 2e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1e-4),
    (175e9, 6e-5),
)
SIZE_SOURCE = (
    "rates by size of Pythia (Biderman et al. 2023) and GPT-3 (Brown et al. 2020, table 2.1)"
)
_SMALLEST = 14e6  # parameters of the smallest model behind the table
# LLaMA 13B and 65B went up to three times above the table; ten times is beyond any published run.
FAR_FACTOR = 10.0
# Smaller models bear more: the best rate of 5M to 901M models falls with this power of the size.
# Source: Porian et al. 2024 (arXiv:2406.19146). The cap is measured, on GPTs of 0.2-0.4M
# parameters: at 3e-2 they end 0.2 (this project's design) or 0.6 nats (GPT-2's) above 3e-3.
_SMALL_EXPONENT = 0.36
_ADAM_HIGHEST = 3e-2


@dataclass(frozen=True)
class RateRange:
    """The rates between which an optimizer is known to work, and who says so."""

    low: float
    high: float
    source: str

    def __contains__(self, lr: float) -> bool:
        """Whether a rate lies inside, ends and rounding included."""
        return self.low * (1 - 1e-9) <= lr <= self.high * (1 + 1e-9)


def table_rate(parameters: float) -> float:
    """AdamW's rate in the size table, straight between its points in logarithms, flat outside."""
    below = [point for point in SIZE_TABLE if point[0] <= parameters]
    above = [point for point in SIZE_TABLE if point[0] > parameters]
    if not below or not above:
        return (below[-1] if below else above[0])[1]
    (n0, lr0), (n1, lr1) = below[-1], above[0]
    share = math.log(parameters / n0) / math.log(n1 / n0)
    return lr0 * math.pow(lr1 / lr0, share)


def usual_rates(optimizer: str, parameters: float) -> RateRange:
    """The range of rates of `optimizer` for a model of so many parameters, generous on both sides.

    Muon's updates have the length of AdamW's typical ones here (`optim`), and bear more; Adafactor
    multiplies its rate by the weights' own size; SGD's knows no table, since it scales with the
    gradient.
    """
    parameters = max(1.0, parameters)
    table = table_rate(parameters)
    small = max(1.0, _SMALLEST / parameters) ** _SMALL_EXPONENT
    match optimizer:
        case "adam" | "adamw":
            high = min(_ADAM_HIGHEST, FAR_FACTOR * table * small)
            return RateRange(table / FAR_FACTOR, high, SIZE_SOURCE)
        case "muon":
            source = "Liu et al. 2025 (arXiv:2502.16982), eq. 4: Muon's updates at AdamW's length"
            return RateRange(table / 2, min(0.1, 50 * table * small), source)
        case "adafactor":
            source = "Shazeer & Stern 2018 (arXiv:1804.04235): relative steps of 1e-2"
            return RateRange(1e-3, 0.1, source)
        case "sgd":
            source = (
                "no table exists for SGD; 0.01 is the chapter's, small GPTs train here up to 10"
            )
            return RateRange(1e-2, 10.0, source)
    raise ValueError(f"no such optimizer: {optimizer}")
