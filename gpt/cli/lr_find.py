"""The command `gpt-lr find`: the learning-rate finder. Imports torch only when work begins."""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.errors import UserError, json_line, say

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.configfile import Override
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
    """Searches, prints what was found, and writes it."""
    from gpt.configfile import free_copy, load_config
    from gpt.lr.budget import parse_budget
    from gpt.lr.draft import from_first_step

    asked = load_config(arguments.config, overrides)
    config = from_first_step(asked)
    budget = parse_budget(arguments.budget)
    target = None
    if arguments.apply is not None:
        target = free_copy(arguments.apply, arguments.config, "found")
    out = arguments.out or Path(config.run.dir) / f"{config.run.name}-lr-find"
    with _made(out):
        if (restart := asked.schedule.restart_step) is not None:
            say(f"note     schedule.restart_step {restart} is left out: the rate is a new run's")
        if config.model.ngram > 1:
            say(
                "note     with model.ngram short runs want less rate than long ones: the pick is "
                "too low; see docs/lr-find.md"
            )
        found = _search(config, budget)
        answer = found.answer()
        print(json_line(answer) if arguments.json else "\n".join(found.lines()))
        _write(found, config.run.name, answer, out)
    if found.lr is None:
        if target is not None:
            say("not applied: no answer")
        return
    new = _renamed(config)
    if target is not None:
        _apply(asked, new, found, target)
        words = ["--config", str(target)]
    else:
        words = ["--config", str(arguments.config), *_options(asked, new, found.lr, overrides)]
    say(f"train    {shlex.join(['gpt-train', *words])}")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes the folder before any work, and takes it back if nothing came to lie in it.

    Raises UserError where it cannot be made or written to.
    """
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out: {folder} cannot be made a folder: {error.strerror}; name another one"
            ) from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--out: {folder} cannot be written to; name another folder")
        yield
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


def _renamed(config: "Config") -> "Config":
    """The config under a name that no run there has: with another rate it is another run."""
    from gpt.lr.draft import other_name

    name, folder = config.run.name, Path(config.run.dir)
    others = (other_name(name, f"-found{'' if n == 1 else f'-{n}'}") for n in count(1))
    free = next(
        each for each in chain([name], others) if not os.path.lexists(folder / each / "config.yaml")
    )
    return config.model_copy(update={"run": config.run.model_copy(update={"name": free})})


def _options(
    asked: "Config", new: "Config", lr: float, overrides: Sequence["Override"]
) -> list[str]:
    """What makes of the config file the new run at the rate that was found."""
    from gpt.lr.rates import rate_options

    words = [word for name, value in overrides for word in (f"--{name}", value)]
    words += rate_options(new, lr)
    if asked.schedule.restart_step is not None:
        words += ["--schedule.restart_step", "null"]
    if new.run.name != asked.run.name:
        words += ["--run.name", new.run.name]
    return words


def _search(config: "Config", budget: "Budget") -> "Found":
    """The search, with a bar that fills as the budget is spent."""
    from tqdm import tqdm

    from gpt.data import open_data
    from gpt.device import busy_warning, pick_device, set_threads
    from gpt.lr.find import find
    from gpt.malloc import keep_freed_memory

    pick_device(config.train.device)
    set_threads()
    keep_freed_memory(not config.train.activation_checkpointing)
    if budget.seconds is not None and (busy := busy_warning()):
        say(f"warning: {busy}")
    data = open_data(config)
    total = budget.steps(config, data)
    form = "{desc} |{bar:20}| {elapsed}"
    with tqdm(total=total, leave=False, disable=None, bar_format=form) as bar:

        def spent(cost: float) -> None:
            bar.update(min(cost, total - bar.n))

        return find(config, data, budget_steps=total, on_cost=spent, on_stage=bar.set_description)


def _write(found: "Found", name: str, answer: dict[str, Any], out: Path) -> None:
    """Writes the numbers and the picture, and says where."""
    from gpt.files import write_durably
    from gpt.lr.find_plot import plot_found

    try:
        write_durably(out / "lr_find.json", json.dumps(answer, indent=1, allow_nan=False) + "\n")
        plot_found(found, name, out / "lr_find.png")
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written: {error.strerror}; name another folder"
        ) from None
    say(f"details  {out / 'lr_find.json'}, {out / 'lr_find.png'}")


def _apply(asked: "Config", new: "Config", found: "Found", target: Path) -> None:
    """Writes the new run's config with the rate found, and all that keeps its ratio to it."""
    from gpt.configfile import dump_config
    from gpt.files import write_durably
    from gpt.lr.rates import with_lr

    assert found.lr is not None
    assert found.interval is not None
    low, high = found.interval
    text = (
        f"# optimizer.lr {asked.optimizer.lr:g} became {found.lr:g} by gpt-lr find, "
        f"which puts it between {low:g} and {high:g}.\n"
    )
    if new.run.name != asked.run.name:
        text += f"# run.name {asked.run.name} became {new.run.name}: there is such a run already.\n"
    if asked.schedule.restart_step is not None:
        text += f"# schedule.restart_step {asked.schedule.restart_step} is left out.\n"
    try:
        write_durably(target, text + dump_config(with_lr(new, found.lr)))
    except OSError as error:
        raise UserError(
            f"--apply: {target} cannot be written: {error.strerror}; name another file"
        ) from None
    say(f"applied  {target}")
