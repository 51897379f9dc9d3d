"""What to type next: commands that fit the run, or words where there is no config of ours."""

from pathlib import Path
from shlex import quote

from gpt.history import History
from gpt.lr.rates import rate_options


def train_command(history: History, *changes: str, name: str = "") -> str:
    """A gpt-train that repeats the run with some keys changed, under another name."""
    config = history.config
    if config is None:
        return ""
    run = history.path or Path(config.run.dir) / config.run.name
    words = [f"gpt-train --config {quote(str(run / 'config.yaml'))}", *changes]
    if name:
        words.append(f"--run.name {quote(f'{config.run.name}-{name}')}")
    return " ".join(words)


def rate_command(history: History, factor: float) -> str:
    """The run again at its rate times a factor; in words for logs of other programs."""
    config = history.config
    if config is None:
        rates = history.train["lr"]
        known = rates[rates > 0]
        times = f"{factor:g} times the rate" if factor > 1 else f"1/{1 / factor:g} of the rate"
        now = f" ({known.max() * factor:.2g} instead of {known.max():.2g})" if known.size else ""
        return f"the same run at {times}{now}"
    name = "higher-lr" if factor > 1 else "lower-lr"
    return train_command(history, *rate_options(config, factor * config.optimizer.lr), name=name)


def find_command(history: History) -> str:
    """The learning-rate finder on the run's config."""
    config = history.config
    if config is None:
        return "gpt-lr find --config CONFIG.yaml"
    run = history.path or Path(config.run.dir) / config.run.name
    return f"gpt-lr find --config {quote(str(run / 'config.yaml'))}"
