"""What to type next: commands that fit the run, or words where there is no config of ours.

A command comes first and whole, so that the line can be pasted; words on it stand behind a ` # `.
"""

from pathlib import Path
from shlex import join, quote
from typing import Literal

from gpt.config import Config
from gpt.configfile import under_new_name
from gpt.history import History
from gpt.lr.rates import rate_options


def train_command(history: History, *changes: str, name: str = "") -> str:
    """A gpt-train that repeats the run with some keys changed, under another name.

    Without a name it goes on with the run. Empty where there is no config of ours.
    """
    config = history.config
    if config is None:
        return ""
    run = _folder(history, config)
    place = under_new_name(config, name) if name else place_options(config, run)
    return " ".join([f"gpt-train --config {_config_file(run)}", *changes, *map(quote, place)])


def place_options(config: Config, run: Path) -> list[str]:
    """What has a run go on in its own folder, if its config names another place than that."""
    run = run.resolve()
    if (Path(config.run.dir) / config.run.name).resolve() == run:
        return []
    return ["--run.dir", str(run.parent), "--run.name", run.name]


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
    return f"gpt-lr find --config {_config_file(_folder(history, config))}"


def probe_command(history: History, kind: Literal["cooldown", "double"]) -> str:
    """A probe of the run; empty where there is no config of ours."""
    config = history.config
    if config is None:
        return ""
    return join(["gpt-report", str(_folder(history, config)), "--probe", kind])


def text_command(history: History) -> str:
    """Shows how the run's text was read; empty where there is no config of ours."""
    config = history.config
    if config is None:
        return ""
    return f'gpt-data info "$(gpt-data build --config {_config_file(_folder(history, config))})"'


def _folder(history: History, config: Config) -> Path:
    """The run's directory; of one that is being trained the config knows it."""
    return history.path or Path(config.run.dir) / config.run.name


def _config_file(run: Path) -> str:
    return quote(str(run / "config.yaml"))
