"""What to type next: commands that fit the run, or words where there is no config of ours."""

from pathlib import Path

from gpt.history import History


def train_command(history: History, *changes: str, name: str = "") -> str:
    """A gpt-train that repeats the run with some keys changed, under another name."""
    config = history.config
    if config is None:
        return ""
    run = history.path or Path(config.run.dir) / config.run.name
    words = [f"gpt-train --config {run / 'config.yaml'}", *changes]
    if name:
        words.append(f"--run.name {config.run.name}-{name}")
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
    lr = config.optimizer.lr * factor
    return train_command(
        history, f"--optimizer.lr {lr:.1e}", name="higher-lr" if factor > 1 else "lower-lr"
    )


def find_command(history: History) -> str:
    """The learning-rate finder on the run's config."""
    config = history.config
    if config is None:
        return "gpt-lr find --config CONFIG.yaml"
    run = history.path or Path(config.run.dir) / config.run.name
    return f"gpt-lr find --config {run / 'config.yaml'}"
