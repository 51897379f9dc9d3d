"""One number that moves a whole config's rates: another lr, everything else in proportion."""

from pydantic import ValidationError

from gpt.config import Config, contradictions
from gpt.errors import UserError

MAX_LR = 1e3  # optimizer.lr's own limit


def with_lr(config: Config, lr: float) -> Config:
    """The config with another peak rate; every rate that is given beside it keeps its ratio to lr.

    That is `optimizer.adamw_lr` and a floor given as `schedule.min_lr`. The schedule `chapter` has
    an absolute floor (its eta_min), which stays what it is, save that it never lies above lr: a
    rate below it would rise. `optimizer.lr_batch_size` is dropped: it spoke of the old rate.

    Raises UserError where no config can hold such a rate.
    """
    values = config.model_dump()
    for key, value in _moved(config, lr).items():
        section, _, name = key.partition(".")
        values[section][name] = value
    try:
        changed = Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        raise UserError(
            f"lr {lr:g}: {key} would be {first['input']!r} ({first['msg']}); take another rate"
        ) from None
    problems = [f"lr {lr:g}: {found.keys[0]}: {found.message}" for found in contradictions(changed)]
    if problems:
        raise UserError(*problems)
    return changed


def rate_options(config: Config, lr: float) -> list[str]:
    """What to type for another peak rate, in two digits, and all that keeps its ratio to it."""
    words: list[str] = []
    for key, value in _moved(config, float(f"{lr:.1e}")).items():
        text = "null" if value is None else rate_text(float(f"{value:.3g}"))
        words += [f"--{key}", text]
    return words


def _moved(config: Config, lr: float) -> dict[str, float | None]:
    """The keys that change with the peak rate, and what they become."""
    optimizer, schedule = config.optimizer, config.schedule
    factor = lr / optimizer.lr
    moved: dict[str, float | None] = {"optimizer.lr": lr}
    if optimizer.lr_batch_size is not None:
        moved["optimizer.lr_batch_size"] = None
    if optimizer.adamw_lr is not None:
        moved["optimizer.adamw_lr"] = _rounded(optimizer.adamw_lr * factor)
    if schedule.name == "chapter":
        if config.min_lr > lr:
            moved["schedule.min_lr"] = lr
    elif schedule.min_lr:
        # Rounding must not lift a floor as high as the peak above it.
        moved["schedule.min_lr"] = min(_rounded(schedule.min_lr * factor), lr)
    return moved


def _rounded(rate: float) -> float:
    """Without the last digits, which only say that 0.003 x 3 is 0.009000000000000001."""
    return float(f"{rate:.12g}")


def rate_text(lr: float) -> str:
    """The rate in as few digits as say it exactly, two at least: `3.0e-04`, `1.25e-03`."""
    return next(text for digits in range(1, 18) if float(text := f"{lr:.{digits}e}") == lr)
