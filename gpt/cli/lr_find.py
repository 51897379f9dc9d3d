"""The command `gpt-lr find`: the learning-rate finder. Imports torch only when work begins."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.errors import UserError, json_line, say

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.configfile import Override
    from gpt.data import TokenData
    from gpt.lr.budget import Budget
    from gpt.lr.find import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--budget",
        default="15%",
        metavar="B",
        help="what the search may cost: a share of the training run's steps (15%% or 0.15, the "
        "default), or a time (90s, 5min)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of lr_find.json and lr_find.png; default RUN.DIR/RUN.NAME-lr-find",
    )
    parser.add_argument(
        "--apply",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="write the config with the rate that was found; default CONFIG-found.yaml beside it",
    )
    parser.add_argument("--json", action="store_true", help="print lr_find.json")


def run(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> None:
    """Searches, writes what was found, and prints it."""
    from gpt.configfile import free_copy, load_config
    from gpt.lr.budget import parse_budget

    config = load_config(arguments.config, overrides)
    budget = parse_budget(arguments.budget)
    target = None
    if arguments.apply is not None:
        target = free_copy(arguments.apply, arguments.config, "found")
    out = arguments.out or Path(config.run.dir) / f"{config.run.name}-lr-find"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")

    from gpt.data import open_data
    from gpt.device import busy_warning, pick_device, set_threads
    from gpt.lr.rates import rate_options
    from gpt.malloc import keep_freed_memory

    pick_device(config.train.device)
    set_threads()
    keep_freed_memory(not config.train.activation_checkpointing)
    if budget.seconds is not None and (busy := busy_warning()):
        say(f"warning: {busy}")
    found = _search(config, open_data(config), budget)
    answer = found.answer()
    _write(found, config.run.name, answer, out)
    if target is not None and found.lr is not None:
        _apply(config, found, target)
    if arguments.json:
        print(json_line(answer))
    else:
        print("\n".join(found.lines()))
    say(f"details  {out / 'lr_find.json'}, {out / 'lr_find.png'}")
    if found.lr is not None:
        words = ["gpt-train", "--config", str(target or arguments.config)]
        if target is None:
            words += [word for name, value in overrides for word in (f"--{name}", value)]
            words += rate_options(config, found.lr)
        say(f"train    {shlex.join(words)}")


def _search(config: "Config", data: "TokenData", budget: "Budget") -> "Found":
    """The search, with a bar that fills as the budget is spent."""
    from tqdm import tqdm

    from gpt.lr.find import find

    total = budget.steps(config, data)
    form = "{desc} |{bar:20}| {elapsed}"
    with tqdm(total=total, leave=False, disable=None, bar_format=form) as bar:

        def spent(cost: float) -> None:
            bar.update(min(cost, total - bar.n))

        return find(config, data, budget_steps=total, on_cost=spent, on_stage=bar.set_description)


def _write(found: "Found", name: str, answer: dict[str, Any], out: Path) -> None:
    """The numbers and the picture."""
    from gpt.files import write_durably
    from gpt.lr.find_plot import plot_found

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / "lr_find.json", json.dumps(answer, indent=1, allow_nan=False) + "\n")
        plot_found(found, name, out / "lr_find.png")
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written: {error.strerror}; name another folder"
        ) from None


def _apply(config: "Config", found: "Found", target: Path) -> None:
    """Writes the config with the rate found, and everything that keeps its ratio to it."""
    from gpt.configfile import dump_config
    from gpt.files import write_durably
    from gpt.lr.rates import with_lr

    assert found.lr is not None
    assert found.interval is not None
    low, high = found.interval
    text = (
        f"# optimizer.lr {config.optimizer.lr:g} became {found.lr:g} by gpt-lr find, "
        f"which puts it between {low:g} and {high:g}.\n"
    )
    try:
        write_durably(target, text + dump_config(with_lr(config, found.lr)))
    except OSError as error:
        raise UserError(
            f"--apply: {target} cannot be written: {error.strerror}; name another file"
        ) from None
    say(f"applied  {target}")
