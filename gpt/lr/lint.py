"""What looks wrong in a config before step 1: rules with thresholds, sources and remedies.

Each rule speaks only of clear mistakes: it is quiet for every published recipe in `recipes`. What
a run shows once it trains is not judged here.
"""

import math
from collections.abc import Callable, Iterator

from gpt.config import Config
from gpt.lr.findings import Facts, Finding
from gpt.lr.lint_optimizer import (
    DECAY_HIGHEST,
    DECAY_HIGHEST_REPEATED,
    REPEATED_EPOCHS,
    betas_for_batch,
    coupled_decay,
    decay_range,
    lr_far_from_size,
    lr_for_other_batch,
    lr_for_other_optimizer,
)
from gpt.plan import Plan

Rule = Callable[[Config, Plan, Facts], Iterator[Finding]]

# A longer warmup eats into the run. The first steps of any run may warm up, though: Adam's second
# moment needs 1 / (1 - 0.95) = 20 of them to fill, and a tenth of a very short run.
WARMUP_SHARE = 0.05
WARMUP_ALWAYS_STEPS = 20
WARMUP_ALWAYS_SHARE = 0.1
# Muennighoff et al.: up to 4 epochs are as good as new text, 16 still pay, 40 are worthless.
# GPT-1 and nanoGPT's Shakespeare trained for 80 to 100, with dropout against learning by heart.
MANY_EPOCHS = 16.0
MANY_EPOCHS_DROPOUT = 100.0
DROPOUT = 0.1
# With documents half as long as the context, half of all pairs of positions cross a border.
CONTEXT_DOCUMENTS = 2.0
# T_max this close to the run's own length makes no difference.
T_MAX_SLACK = 0.01


def lint(config: Config, plan: Plan, facts: Facts) -> list[Finding]:
    """Everything that looks wrong, the most important first. Rules without their facts stay silent.

    `plan` may be one that gpt-train would refuse (`Plan.from_config` with `strict=False`).
    """
    return [finding for rule in RULES for finding in rule(config, plan, facts)]


def unchecked(config: Config, facts: Facts) -> list[str]:
    """The ids of the rules that could not be checked, since a fact is missing."""
    ids = []
    if facts.device is None and config.train.dtype != "fp32":
        ids.append("dtype_unsupported")
    if facts.train_tokens is None:
        if DECAY_HIGHEST < config.optimizer.weight_decay <= DECAY_HIGHEST_REPEATED:
            ids.append("decay_range")
        ids += ["many_epochs", "context_longer_than_documents"]
    return ids


def _floor_above_peak(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    floor, optimizer = config.min_lr, config.optimizer
    peaks = [("optimizer.lr", optimizer.lr)]
    if config.schedule.name == "chapter" and optimizer.name == "muon" and optimizer.adamw_lr:
        peaks.append(("optimizer.adamw_lr", optimizer.adamw_lr))  # its floor is one for all groups
    for key, peak in peaks:
        if floor > peak:
            yield Finding(
                "floor_above_peak",
                f"the floor min_lr {floor:g} is above the peak {key.partition('.')[2]} {peak:g}: "
                "the rate would rise to the end",
                f"--schedule.min_lr {peak / 10:g}",
                "Touvron et al. 2023 (LLaMA), section 2.3: a final rate of a tenth of the peak",
            )


def _warmup_too_long(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    total, warmup = plan.steps, config.warmup_steps(plan.total_steps)
    longest = max(WARMUP_SHARE * total, min(WARMUP_ALWAYS_STEPS, WARMUP_ALWAYS_SHARE * total))
    if warmup <= longest:
        return
    share = "longer than" if warmup > total else f"{100 * warmup / total:.3g} % of"
    remedy = _shorter_warmup(config, longest)
    if config.schedule.warmup_steps is not None:
        remedy += _or_longer(config, plan.origin + math.ceil(warmup / WARMUP_SHARE), facts)
    whose = "the restart's" if plan.origin else "the run's"
    yield Finding(
        "warmup_too_long",
        f"a warmup of {warmup:,} steps is {share} {whose} {total:,}; over "
        f"{100 * WARMUP_SHARE:.0f} % of it the peak comes too late to be used",
        remedy,
        "Godbole et al. 2023 (Tuning Playbook), learning rate warmup; 1-5 % is usual (chapter 17)",
    )


def _shorter_warmup(config: Config, longest: float) -> str:
    """A warmup well below `longest` steps, in the key that says how long it is."""
    if config.schedule.warmup_steps is None:
        return "--schedule.warmup_fraction 0.02"
    return f"--schedule.warmup_steps {math.floor(longest / 2)}"


def _or_longer(config: Config, steps: int, facts: Facts) -> str:
    """The limit that ends the run before `steps`, raised; empty where there are several."""
    train, step_tokens = config.train, config.tokens_per_step
    limits: list[tuple[str, float, float]] = []  # as given, and as it would be
    if train.max_steps is not None:
        limits.append(("max_steps", train.max_steps, steps))
    if train.max_tokens is not None:
        limits.append(("max_tokens", train.max_tokens, steps * step_tokens))
    if train.max_epochs is not None:
        if not facts.train_tokens:
            return ""
        epochs = steps * step_tokens / facts.train_tokens
        limits.append(("max_epochs", train.max_epochs, math.ceil(100 * epochs) / 100))
    short = [(key, wanted) for key, given, wanted in limits if given < wanted]
    if len(short) != 1:
        return ""
    key, wanted = short[0]
    return f", or a longer run: --train.{key} {wanted}"


def _peak_not_reached(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    total, warmup = plan.steps, config.warmup_steps(plan.total_steps)
    # All schedules are highest at the end of the warmup, where the run gets there.
    lr = config.optimizer.lr
    top = max(plan.rebased.factor(step, lr) for step in (0, min(warmup, total - 1)))
    if top >= 1 - 1e-9:
        return
    yield Finding(
        "peak_not_reached",
        f"the rate gets to {100 * top:.3g} % of lr {lr:g} at most: its warmup of "
        f"{warmup:,} steps does not end within the {total:,} that it has",
        _shorter_warmup(config, WARMUP_SHARE * total),
        "pytorch/torchtitan#1284, a schedule that never reached its peak",
    )


def _cosine_overrun(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    if config.schedule.name != "chapter":
        return
    total, warmup = plan.steps, config.warmup_steps(plan.total_steps)
    t_max = config.schedule.cosine_steps or total
    fitting = total - warmup
    # torch's last used step is the one before the end, so both are right.
    if fitting < 1 or (1 - T_MAX_SLACK) * (fitting - 1) <= t_max <= (1 + T_MAX_SLACK) * fitting:
        return
    if t_max > fitting:
        end = plan.rate(plan.total_steps - 1, config.optimizer.lr)
        effect = f"the rate ends at {end:.3g}, and not at the floor {config.min_lr:g}"
    else:
        effect = (
            f"the cosine is at its floor at step {plan.warmup_end + t_max:,}, and rises after it"
        )
    yield Finding(
        "cosine_overrun",
        f"T_max is {t_max:,} steps, the run has {fitting:,} after its warmup: {effect}",
        f"--schedule.cosine_steps {fitting}, or --schedule.name warmup_cosine",
        "torch.optim.lr_scheduler.CosineAnnealingLR: T_max is half a period; chapter 17.6.3",
    )


def _dtype_unsupported(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    wish, device = config.train.dtype, facts.device
    if wish == "fp16" and device == "cpu":
        yield Finding(
            "dtype_unsupported",
            "dtype fp16 on a CPU, which has no fast fp16 products: slower than fp32, and small "
            "gradients are lost",
            f"--train.dtype {'bf16' if facts.has_bf16 else 'fp32'}",
            "Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2",
        )
    elif wish == "bf16" and device is not None and facts.has_bf16 is False:
        other = "fp16" if device == "cuda" else "fp32"
        yield Finding(
            "dtype_unsupported",
            f"dtype bf16 on a {device} device without it: it is emulated, and much slower",
            f"--train.dtype {other}",
            "the device's own report: AVX512-BF16 or AMX on a CPU, compute capability 8.0 on CUDA",
        )


def _many_epochs(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    epochs, dropout = facts.epochs(config, plan), config.model.dropout
    limit = MANY_EPOCHS_DROPOUT if dropout >= DROPOUT else MANY_EPOCHS
    if epochs is None or epochs <= limit:
        return
    guard = ""
    if dropout < DROPOUT and epochs <= MANY_EPOCHS_DROPOUT:
        guard = f", or against learning by heart --model.dropout {2 * DROPOUT:g}"
    yield Finding(
        "many_epochs",
        f"{epochs:,.1f} epochs of {facts.train_tokens:,} tokens: beyond 4 repeated text is worth "
        f"less than new, beyond {MANY_EPOCHS:.0f} hardly anything",
        f"more text, --train.max_epochs {REPEATED_EPOCHS:.0f}{guard}",
        "Muennighoff et al. 2023 (arXiv:2305.16264)",
    )


def _context_longer_than_documents(config: Config, plan: Plan, facts: Facts) -> Iterator[Finding]:
    if not facts.train_tokens or not facts.documents or facts.documents < 2:
        return
    context, mean = config.model.context_len, facts.train_tokens / facts.documents
    if context < CONTEXT_DOCUMENTS * mean:
        return
    yield Finding(
        "context_longer_than_documents",
        f"a context of {context:,} tokens over documents of {mean:,.0f} on average: most of what a "
        "token sees belongs to other documents",
        f"--model.context_len {2 ** max(3, math.ceil(math.log2(max(1.0, mean))))}",
        "Pouransari et al. 2024 (arXiv:2405.13226)",
    )


RULES: tuple[Rule, ...] = (
    _floor_above_peak,
    _warmup_too_long,
    _peak_not_reached,
    lr_for_other_optimizer,
    lr_far_from_size,
    coupled_decay,
    lr_for_other_batch,
    _cosine_overrun,
    _dtype_unsupported,
    decay_range,
    betas_for_batch,
    _many_epochs,
    _context_longer_than_documents,
)
