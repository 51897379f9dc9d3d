"""Rules about the optimizer's own numbers: rate, batch, decay, betas."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import replace

from gpt.config import Config
from gpt.lr.findings import Facts, Finding
from gpt.lr.rates import rate_options
from gpt.lr.recipes import RateRange, recipe_of_preset, usual_rates
from gpt.plan import Plan

# Batches up to four times off a recipe's move the rate by a factor of two at most.
BATCH_FACTOR = 4.0
SAME_SIZE = 1.5
SAME_RATE = 0.25  # a rate so near to the published one was taken from there
# Coupled decay, as measured on a GPT of 0.1M parameters (nats in validation, 800 steps): Adam with
# 0, 1e-4, 1e-3, 0.01, 0.1 ends at 2.04, 2.06, 2.10, 2.22, 3.25; SGD that loses 0, 2, 10, 20 % of
# each weight at a step goes 2.17, 2.12, 2.35, 2.53 (the third at another rate: 2.25 without).
COUPLED_ADAM = 1e-3
COUPLED_SGD_SHRINK = 0.1
# The chapter's usual decay, and three times beyond it on the high side. Weaker decay does no harm.
DECAY = (0.01, 0.1)
DECAY_HIGHEST = 0.3
# Text read more than four times: the best decay there was up to 30 times 0.1.
REPEATED_EPOCHS = 4.0
DECAY_HIGHEST_REPEATED = 3.2
# What AdamW trains beside Muon are tables and vectors, whose rates do not shrink with the width
# (Yang et al. 2022, table 8). Measured with 5.25M parameters: 0.03 ends at 1.465, 0.014 at 1.476.
HIGHEST_BESIDE_MUON = 0.04
# Tokens in which Adam's second moment forgets half: from 53,000 (nanoGPT's recipe for the smallest
# batch) to 54 million (LLaMA) in `recipes`. Measured on a GPT of 0.4M parameters with 64 tokens a
# step: β₂ 0.95, a half-life of 900 tokens, ends at 5.15 nats, 0.99 at 4.99.
HALF_LIFE_TOKENS = (5_000, 200_000_000)
LONG_BETA2 = 0.99  # up to here a half-life is 69 steps at most, and a shorter run is only a trial


def lr_for_other_optimizer(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    """A rate outside of this optimizer's range that is usual for another."""
    name, lr = config.optimizer.name, config.optimizer.lr
    usual = _usual(config, facts, name)
    if lr in usual:
        return
    for other in ("adamw", "sgd"):
        theirs = _usual(config, facts, other)
        if other == name or (other == "adamw" and name == "adam") or lr not in theirs:
            continue
        yield Finding(
            "lr_for_other_optimizer",
            f"lr {lr:g} is a rate for {other} ({_span(theirs)} at this size); {name} trains with "
            f"{_span(usual)}",
            f"{_at_rate(config, _middle(usual))}, or --optimizer.name {other}",
            usual.source,
        )
        return


def lr_far_from_size(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    """A rate with which no model of this size is known to train."""
    optimizer = config.optimizer
    rates = [("optimizer.lr", optimizer.name, optimizer.lr)]
    if optimizer.name == "muon" and optimizer.adamw_lr is not None:
        rates.append(("optimizer.adamw_lr", "adamw", optimizer.adamw_lr))
    for key, name, lr in rates:
        usual = _usual(config, facts, name)
        if key == "optimizer.adamw_lr":
            usual = replace(usual, high=max(usual.high, HIGHEST_BESIDE_MUON))
        of_adamw = _usual(config, facts, "adamw")
        # For other optimizers than Adam there is no table by size: another's rate says it all.
        if lr in usual or (name not in ("adam", "adamw") and lr in of_adamw):
            continue
        off = (
            f"{usual.low / lr:.3g} times below"
            if lr < usual.low
            else f"{lr / usual.high:.3g} times above"
        )
        size = _size(_rated(config, facts))
        middle = _middle(usual)
        remedy = _at_rate(config, middle) if key == "optimizer.lr" else f"--{key} {middle:g}"
        yield Finding(
            "lr_far_from_size",
            f"{key.partition('.')[2]} {lr:g} is {off} the range {_span(usual)} in which {name} is "
            f"known to train models of {size} parameters",
            f"{remedy}, or measure it: gpt-lr find",
            usual.source,
        )


def coupled_decay(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    """AdamW's decay in an optimizer that adds it to the gradient."""
    optimizer = config.optimizer
    decay = optimizer.weight_decay
    if optimizer.name == "adam" and decay >= COUPLED_ADAM:
        yield Finding(
            "coupled_decay",
            f"weight_decay {decay:g} is meant for adamw: adam adds it to the gradient, and divides "
            "both by the gradient's own size, so that it outweighs small gradients and spares the "
            "large ones",
            "--optimizer.name adamw, or --optimizer.weight_decay 0",
            "Loshchilov & Hutter 2019 (arXiv:1711.05101), section 2",
        )
    shrink = optimizer.lr * decay / (1 - optimizer.momentum)
    if optimizer.name == "sgd" and shrink >= COUPLED_SGD_SHRINK:
        fitting = COUPLED_SGD_SHRINK * (1 - optimizer.momentum) / optimizer.lr
        yield Finding(
            "coupled_decay",
            f"weight_decay {decay:g} is meant for adamw: sgd takes lr x decay / (1 - momentum) = "
            f"{100 * shrink:.3g} % off every weight at each step",
            f"--optimizer.weight_decay {_one_digit(fitting / 10):g}",
            "Loshchilov & Hutter 2019 (arXiv:1711.05101), proposition 1",
        )


def lr_for_other_batch(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    """A rate chosen, by the user or by a published recipe, at another batch."""
    optimizer, batch = config.optimizer, config.train.batch_size
    rule, power = ("linear", 1.0) if optimizer.name == "sgd" else ("√", 0.5)
    given = optimizer.lr_batch_size
    recipe = recipe_of_preset(config.model.preset)
    if given is not None:
        if given != batch:
            fitting = optimizer.lr * (batch / given) ** power
            options = shlex.join(rate_options(_with(config, lr_batch_size=None), fitting))
            yield Finding(
                "lr_for_other_batch",
                f"lr {optimizer.lr:g} was chosen at a batch of {given} sequences, this run has "
                f"{batch}; the {rule} rule makes it {fitting:.3g}",
                f"{options} --optimizer.lr_batch_size {batch}",
                _BATCH_SOURCES[rule],
            )
        return
    if recipe is None or optimizer.name not in ("adam", "adamw"):
        return
    if not 1 / SAME_SIZE <= _rated(config, facts) / recipe.parameters <= SAME_SIZE:
        return  # keys beside the preset made another model of it
    ratio = config.tokens_per_step / recipe.batch_tokens
    from_there = abs(optimizer.lr / recipe.lr - 1) <= SAME_RATE
    if from_there and not 1 / BATCH_FACTOR <= ratio <= BATCH_FACTOR:
        fitting = optimizer.lr * ratio**power
        off = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
        yield Finding(
            "lr_for_other_batch",
            f"lr {optimizer.lr:g} is that of {recipe.name} at {recipe.batch_tokens:,} tokens a "
            f"step; this run has {config.tokens_per_step:,}, {off} that: the √ rule makes it "
            f"{fitting:.2g}",
            f"{shlex.join(rate_options(config, fitting))}, or --train.batch_size "
            f"{max(1, round(recipe.batch_tokens / config.model.context_len))} "
            "(with --train.micro_batch_size for what the memory holds)",
            f"{recipe.source}; {_BATCH_SOURCES['√']}",
        )


_BATCH_SOURCES = {
    "√": "Malladi et al. 2022 (arXiv:2205.10287): Adam's rate goes with √batch",
    "linear": "Goyal et al. 2017 (arXiv:1706.02677): SGD's rate goes with the batch",
}


def decay_range(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    """A decoupled decay that takes the weights away; how much is right depends on the epochs."""
    optimizer, epochs = config.optimizer, facts.epochs(config, plan)
    if optimizer.name in ("sgd", "adam"):  # coupled: another scale, see `coupled_decay`
        return
    decay, repeated = optimizer.weight_decay, epochs is None or epochs > REPEATED_EPOCHS
    highest = DECAY_HIGHEST_REPEATED if repeated else DECAY_HIGHEST
    if decay <= highest:
        return
    low, high = DECAY
    how_often = "" if epochs is None else f" for {epochs:.2g} epochs"
    yield Finding(
        "decay_range",
        f"weight_decay {decay:g} is far above the usual {low:g}-{high:g}{how_often}; text that is "
        "read many times bears up to 3",
        f"--optimizer.weight_decay {high:g}",
        "chapter 17.7.3; Kim et al. 2025 (arXiv:2509.14786) on repeated text",
    )


def betas_for_batch(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    """A second moment that forgets too soon or too late for the batch and the run."""
    optimizer = config.optimizer
    if optimizer.name not in ("adam", "adamw", "muon"):
        return
    beta1, beta2 = optimizer.betas
    tokens, total = config.tokens_per_step, plan.total_steps
    source = "Marek et al. 2025 (arXiv:2507.07101): the half-life of β₂, in tokens"
    if beta1 > beta2:
        yield Finding(
            "betas_for_batch",
            f"β₁ {beta1:g} is above β₂ {beta2:g}: the step remembers gradients that its scale has "
            "forgotten, and a large one goes through undamped",
            f'--optimizer.betas "[{min(0.9, beta1):g}, {max(0.95, beta1):g}]"',
            "Kingma & Ba 2015 (arXiv:1412.6980), theorem 4.1: β₁² < √β₂",
        )
        return
    steps = math.log(0.5) / math.log(beta2) if beta2 > 0 else 0.0
    few, many = HALF_LIFE_TOKENS
    half_life = f"β₂ {beta2:g} forgets half in {steps:,.0f} steps of {tokens:,} tokens"
    longest = _beta2(total / 10)
    if steps > total and beta2 > LONG_BETA2:
        yield Finding(
            "betas_for_batch",
            f"{half_life}, and the run has {total:,}: the scale of its steps stays that of the "
            "first gradients",
            f'--optimizer.betas "[{beta1:g}, {min(0.99, max(0.95, longest)):g}]"',
            source,
        )
    elif steps * tokens < few and beta2 < longest:
        fitting = min(longest, _beta2(few / tokens, up=True))
        yield Finding(
            "betas_for_batch",
            f"{half_life}: the scale of its steps is taken from {steps * tokens:,.0f} tokens, too "
            "few to be steady; small batches want a longer memory",
            f'--optimizer.betas "[{beta1:g}, {fitting:g}]"',
            source,
        )
    elif steps * tokens > many:
        yield Finding(
            "betas_for_batch",
            f"{half_life}: {steps * tokens / 1e6:,.0f}M tokens; batches of this size are trained "
            "with 0.95, so that the scale follows when gradients grow",
            f'--optimizer.betas "[{beta1:g}, 0.95]"',
            source,
        )


def _at_rate(config: Config, lr: float) -> str:
    """What to type for another `optimizer.lr`; muon's `adamw_lr` has a finding of its own."""
    return shlex.join(rate_options(_with(config, adamw_lr=None), lr))


def _with(config: Config, **changes: None) -> Config:
    """The config without some of its optimizer's keys."""
    optimizer = config.optimizer.model_copy(update=changes)
    return config.model_copy(update={"optimizer": optimizer})


def _usual(config: Config, facts: Facts, optimizer: str) -> RateRange:
    """The usual rates at this size; with muP at the width that the rate was chosen for."""
    base = config.model.mup_base_width
    ratio = 1.0 if base is None else base / config.model.n_embd
    return usual_rates(optimizer, _rated(config, facts) * ratio**2)


def _rated(config: Config, facts: Facts) -> int:
    """Parameters as rates by size count them: no published model has a table of n-grams."""
    return facts.parameters - config.model.ngram_parameters


def _middle(usual: RateRange) -> float:
    """A rate to begin with."""
    return _one_digit(math.sqrt(usual.low * usual.high))


def _beta2(half_life_steps: float, *, up: bool = False) -> float:
    """The β₂ with this half-life in steps, cut (or rounded up) to a usual value."""
    exact = 0.5 ** (1 / max(1.0, half_life_steps))
    usual = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999)
    if up:
        return next((value for value in usual if value >= exact), usual[-1])
    return max((value for value in usual if value <= exact), default=usual[0])


def _span(rates: RateRange) -> str:
    return f"{rates.low:.2g} to {rates.high:.2g}"


def _one_digit(value: float) -> float:
    return float(f"{value:.0e}")


def _size(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
