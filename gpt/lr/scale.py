"""What a config becomes at another batch, width, depth or length, with the arithmetic of each step.

The formulas are in `rules`, width and depth in `resize`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from gpt.config import Config
from gpt.errors import UserError
from gpt.lr.draft import Change, Draft, from_first_step
from gpt.lr.rates import with_lr
from gpt.lr.resize import effects, resize
from gpt.lr.rules import (
    HALF_LIFE,
    HIGHEST_BETA,
    HORIZON,
    HORIZON_EXPONENT,
    LINEAR,
    SQRT,
    TIMESCALE,
    horizon_rate,
    scaled_beta2,
    scaled_decay,
    scaled_rate,
)
from gpt.lr.size import run_tokens, tokenized

Rule = Literal["auto", "linear", "sqrt", "none"]

ADAM_TYPE = ("adam", "adamw", "muon")
DECOUPLED = ("adamw", "muon")
SAME_RATIO = "keeps its ratio to lr"
SAME_TOKENS = "the same tokens in the run"
SAME_SHARE = "the same share of the run"


@dataclass(frozen=True)
class Scaled:
    """A config at another size. `effects` are what the model and the optimizer make of the keys."""

    config: Config
    changes: tuple[Change, ...]
    effects: tuple[str, ...]
    notes: tuple[str, ...]


def scale(
    config: Config,
    *,
    batch: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    tokens: int | None = None,
    rule: Rule = "auto",
) -> Scaled:
    """The config at another batch (sequences), width, depth or length (tokens of the run).

    Without `tokens` another batch keeps the run's tokens, and changes its steps. Raises UserError
    where no rule is known, or where what comes out cannot be a config.
    """
    if batch is None and width is None and depth is None and tokens is None:
        raise UserError(
            "gpt-lr scale: nothing to scale; give --batch N, --width N, --depth N or --tokens N"
        )
    draft = Draft(config.model_dump())
    if config.schedule.restart_step is not None:
        config = _from_first_step(draft, config)
    if width is not None or depth is not None:
        resize(draft, config.model, width, depth)
    if batch is not None or tokens is not None:
        _reschedule(draft, config, batch, tokens, rule)
    scaled = draft.checked()
    done = tuple(effects(scaled)) if width is not None or depth is not None else ()
    return Scaled(scaled, tuple(draft.changes), done, tuple(draft.notes))


def _from_first_step(draft: Draft, config: Config) -> Config:
    """The run as a new one, whose schedule does not begin anew in its middle."""
    restart = config.schedule.restart_step
    draft.set("schedule.restart_step", None, "null: from the first step on", "a new run")
    draft.notes.append(
        f"the schedule began anew at step {restart}; the scaled run is a new one, without that"
    )
    return from_first_step(config)


def _reschedule(
    draft: Draft, config: Config, batch: int | None, tokens: int | None, rule: Rule
) -> None:
    """Batch and length: sizes, steps, then the rate, and what follows from it."""
    tuned_at = config.optimizer.lr_batch_size or config.train.batch_size
    batch_ratio = 1.0 if batch is None else batch / tuned_at
    tokens_ratio = 1.0
    if batch is not None:
        asked = f"asked for; lr was chosen at {tuned_at}"
        draft.set("train.batch_size", batch, f"{batch} sequences", asked)
        micro = config.train.micro_batch_size
        if micro is not None and micro > batch:
            draft.set("train.micro_batch_size", batch, "at most the batch", "a step holds it")
    new_batch = config.train.batch_size if batch is None else batch
    if tokens is not None:
        tokens_ratio = _set_tokens(draft, config, new_batch, tokens)
    else:
        _keep_tokens(draft, config, new_batch)
    lr = _rate(draft, config, batch_ratio, tokens_ratio, rule)
    _set_rate(draft, config, lr, keep_batch=batch is None)
    _betas(draft, config, batch_ratio)
    _decay(draft, config, batch_ratio, lr / config.optimizer.lr, tokens_ratio)


def _set_tokens(draft: Draft, config: Config, batch: int, tokens: int) -> float:
    """Makes the run `tokens` long; returns how many times as long that is."""
    before = run_tokens(config, tokenized(config))
    if before is None:
        raise UserError(
            f"--tokens {tokens}: how long the run is now, in train.max_epochs, only the tokenized "
            "text tells; say gpt-data build with this config first, or give --train.max_steps"
        )
    step = batch * config.model.context_len
    steps = math.ceil(tokens / step)
    arithmetic = f"{tokens:,} tokens / ({batch} x {config.model.context_len}) = {steps:,}"
    draft.set("train.max_steps", steps, arithmetic, "asked for")
    for key in ("max_tokens", "max_epochs"):
        draft.set(f"train.{key}", None, "max_steps is the limit now", "asked for")
    _stretch(draft, config, before // config.tokens_per_step, steps)
    return tokens / before


def _keep_tokens(draft: Draft, config: Config, batch: int) -> None:
    """Another batch and the same tokens: limits and lengths that are in steps change."""
    old, steps = config.train.batch_size, config.train.max_steps
    if batch == old:
        return
    if steps is None:  # max_tokens and max_epochs keep the tokens by themselves
        _stretch(draft, config, batch, old)
        return
    fewer = max(1, round(steps * old / batch))
    draft.set("train.max_steps", fewer, f"{steps:,} x {old} / {batch} = {fewer:,}", SAME_TOKENS)
    _stretch(draft, config, steps, fewer)


def _stretch(draft: Draft, config: Config, before: int, after: int) -> None:
    """Lengths of the schedule's parts that are given in steps, in proportion."""
    for key in ("warmup_steps", "decay_steps", "cosine_steps"):
        steps = getattr(config.schedule, key)
        if steps:
            now = max(1, round(steps * after / before))
            arithmetic = f"{steps:,} x {after:,} / {before:,} = {now:,}"
            draft.set(f"schedule.{key}", now, arithmetic, SAME_SHARE)
    if config.schedule.name == "wsd":
        _fit_tail(draft, config)


def _fit_tail(draft: Draft, config: Config) -> None:
    """Warmup and tail may both have been rounded up: what is too long comes off the tail.

    It comes off the warmup where the tail is not given in steps, or has only one.
    """
    train = config.train.model_copy(update=draft.values["train"])
    schedule = config.schedule.model_copy(update=draft.values["schedule"])
    now = config.model_copy(update={"train": train, "schedule": schedule})
    # Known before the text is, save for a length in epochs.
    tokens = run_tokens(now, tokenized(config))
    if tokens is None:
        return
    total = tokens // now.tokens_per_step
    lengths = {"decay_steps": now.decay_steps(total), "warmup_steps": now.warmup_steps(total)}
    over = sum(lengths.values()) - total
    for key, least in (("decay_steps", 1), ("warmup_steps", 0)):
        if over > 0 and getattr(schedule, key) is not None:
            less = min(over, lengths[key] - least)
            after = lengths[key] - less
            arithmetic = f"{lengths[key]:,} - {less:,} = {after:,}"
            draft.set(f"schedule.{key}", after, arithmetic, f"both fit into {total:,} steps")
            over -= less


def _rate(
    draft: Draft, config: Config, batch_ratio: float, tokens_ratio: float, rule: Rule
) -> float:
    """The new rate; its steps are noted as they are taken."""
    optimizer = config.optimizer
    lr = optimizer.lr
    if rule == "none":
        draft.notes.append("--rule none: lr stays, whatever the batch and the length")
        return lr
    if batch_ratio != 1:
        chosen = _batch_rule(optimizer.name, rule)
        after = _rounded(scaled_rate(lr, batch_ratio, chosen))
        root = "√" if chosen == "sqrt" else ""
        source = SQRT if chosen == "sqrt" else LINEAR
        draft.set("optimizer.lr", after, f"{lr:g} x {root}{batch_ratio:.4g} = {after:g}", source)
        if optimizer.name == "muon" and rule == "auto":
            draft.notes.append("muon has no rule of its own; √ as for AdamW, like its updates")
        lr = after
    if tokens_ratio != 1:
        if optimizer.name not in ADAM_TYPE:
            draft.notes.append(f"no rule is known for {optimizer.name}'s lr and the run's length")
            return lr
        after = _rounded(horizon_rate(lr, tokens_ratio))
        arithmetic = f"{lr:g} x {tokens_ratio:.4g}^{HORIZON_EXPONENT} = {after:g}"
        draft.set("optimizer.lr", after, arithmetic, HORIZON)
        draft.notes.append(
            "the rule for the length was fitted on runs of billions of tokens, at a fixed batch; "
            "--rule none leaves lr alone, gpt-lr find measures it"
        )
        lr = after
    return lr


def _batch_rule(optimizer: str, rule: Rule) -> Literal["linear", "sqrt"]:
    if rule == "linear" or (rule == "auto" and optimizer == "sgd"):
        return "linear"
    if rule == "sqrt" or optimizer in ADAM_TYPE:
        return "sqrt"
    raise UserError(
        f"--batch: no rule is known for {optimizer}'s rate and the batch; "
        "say --rule sqrt, linear or none"
    )


def _set_rate(draft: Draft, config: Config, lr: float, *, keep_batch: bool) -> None:
    """The keys that go with the rate; `keep_batch`: the batch that lr is for stays what it was."""
    moved = with_lr(config, lr)
    for key, before, after in (
        ("optimizer.adamw_lr", config.optimizer.adamw_lr, moved.optimizer.adamw_lr),
        ("schedule.min_lr", config.schedule.min_lr, moved.schedule.min_lr),
    ):
        if before is not None and after is not None:
            arithmetic = f"{before:g} x {lr / config.optimizer.lr:.4g} = {after:g}"
            draft.set(key, after, arithmetic, SAME_RATIO)
    if not keep_batch:
        draft.set("optimizer.lr_batch_size", None, "lr is for train.batch_size now", "as scaled")


def _betas(draft: Draft, config: Config, batch_ratio: float) -> None:
    beta1, beta2 = config.optimizer.betas
    if config.optimizer.name not in ADAM_TYPE or batch_ratio == 1:
        return
    after = round(scaled_beta2(beta1, beta2, batch_ratio), 8)
    arithmetic = f"β₂ = {beta2:g}^{batch_ratio:.4g} = {beta2**batch_ratio:.6g}, β₁ stays"
    if after > beta2**batch_ratio and after < HIGHEST_BETA:
        arithmetic += f"; not below β₁: {after:g}"
    draft.set("optimizer.betas", (beta1, after), arithmetic, HALF_LIFE)


def _decay(
    draft: Draft, config: Config, batch_ratio: float, lr_ratio: float, tokens_ratio: float
) -> None:
    name, decay = config.optimizer.name, config.optimizer.weight_decay
    if decay == 0:
        return
    if name not in DECOUPLED:
        draft.notes.append(f"weight_decay stays: its rule is known for AdamW, not for {name}")
        return
    after = _rounded(
        scaled_decay(decay, batch_ratio=batch_ratio, lr_ratio=lr_ratio, tokens_ratio=tokens_ratio)
    )
    factors = f"{batch_ratio:.4g} / ({lr_ratio:.4g} x {tokens_ratio:.4g})"
    draft.set("optimizer.weight_decay", after, f"{decay:g} x {factors} = {after:g}", TIMESCALE)
    if tokens_ratio != 1:
        draft.notes.append(
            "with more tokens a parameter 2505.13738 finds that B/(lr·λ·D) falls somewhat: "
            "the best weight_decay may be higher than this"
        )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
