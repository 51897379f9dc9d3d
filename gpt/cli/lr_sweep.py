"""The command `gpt-lr sweep`: full runs at several rates. Imports torch only when work begins."""

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.errors import UserError, json_line, say

if TYPE_CHECKING:
    from gpt.configfile import Override
    from gpt.lr.labels import Verdict

MAX_RUNS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--lrs",
        default="auto",
        metavar="A,B,C",
        help="peak rates; auto (default): optimizer.lr times 1/10, 1/3, 1, 3, 10. Every other rate "
        "of the config (optimizer.adamw_lr, schedule.min_lr) keeps its ratio to lr",
    )
    parser.add_argument(
        "--seeds",
        default="1",
        metavar="N",
        help="runs at each rate, with run.seed, run.seed + 1, ...; default 1",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs, sweep.json and sweep.png; default RUN.DIR/RUN.NAME-sweep. The "
        "same command goes on where a sweep was stopped; other --lrs or more --seeds add to it",
    )
    parser.add_argument("--json", action="store_true", help="print sweep.json instead of the table")


def run(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> None:
    """Runs the sweep and prints what came of it."""
    from gpt.configfile import load_config

    config = load_config(arguments.config, overrides)
    lrs = _rates(arguments.lrs)
    n_seeds = _count(arguments.seeds, "--seeds")
    out = arguments.out or Path(config.run.dir) / f"{config.run.name}-sweep"

    from gpt.lr.sweep import Sweep, auto_lrs, report_lines, run_sweep

    lrs = lrs or auto_lrs(config)
    if len(lrs) * n_seeds > MAX_RUNS:
        raise UserError(
            f"--seeds {n_seeds}: {len(lrs)} rates x {n_seeds} seeds are "
            f"{len(lrs) * n_seeds:,} full runs, at most {MAX_RUNS:,} are done; ask for fewer"
        )
    sweep = Sweep(
        config=config,
        lrs=lrs,
        seeds=tuple(range(config.run.seed, config.run.seed + n_seeds)),
        out=out,
        command=_command(arguments, overrides),
    )
    if sweep.seeds[-1] >= 2**63:
        raise UserError(f"--seeds {n_seeds}: run.seed {config.run.seed} leaves no room; lower it")
    ledger = run_sweep(sweep)
    if arguments.json:
        print(json_line(ledger.answer()))
    else:
        print("\n".join(table(ledger.verdict)))
    for line in report_lines(sweep, ledger.verdict):
        say(line)


def table(verdict: "Verdict") -> list[str]:
    """One line a rate: where it ended, its label, and what that rests on."""
    from gpt.lr.rates import rate_text

    rows = [("lr", "seeds", "val loss", "best step", "label", "evidence")]
    for rate in verdict.rates:
        loss = "-" if rate.diverged else f"{rate.mean:.4f}"
        if not rate.diverged and rate.spread is not None:
            loss += f" ± {rate.spread:.4f}"
        steps = sorted({run.best[0] for run in rate.runs if run.best})
        ends = [f"{step:,}" for step in steps[:1] + steps[1:][-1:]]
        rows.append(
            (
                rate_text(rate.lr),
                str(len(rate.runs)),
                loss,
                "-".join(ends) or "-",
                rate.label.replace("_", " "),
                rate.evidence,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _rates(text: str) -> tuple[float, ...]:
    """The rates, lowest first; none for `auto`."""
    from gpt.lr.rates import MAX_LR

    if text.strip() == "auto":
        return ()
    rates: list[float] = []
    for word in text.split(","):
        try:
            rate = float(word)
        except ValueError:
            shown = repr(word.strip()) if word.strip() else "an empty place"
            raise UserError(
                f"--lrs {text}: {shown} is no rate; give numbers such as 1e-4,3e-4,1e-3, or auto"
            ) from None
        if not (0 < rate <= MAX_LR and math.isfinite(rate)):
            raise UserError(
                f"--lrs {text}: {word.strip()} is not above 0 and at most {MAX_LR:g}; "
                "give rates such as 1e-4,3e-4,1e-3"
            )
        if rate in rates:
            raise UserError(f"--lrs {text}: {word.strip()} is given twice; remove one")
        rates.append(rate)
    return tuple(sorted(rates))


def _count(text: str, option: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(
            f"{option} {text}: a whole number of at least 1 is needed; 1 is the default"
        )
    return count


def _command(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> str:
    """The command as typed, without its rates."""
    words = ["gpt-lr", "sweep", "--config", str(arguments.config)]
    if arguments.seeds != "1":
        words += ["--seeds", arguments.seeds]
    if arguments.out is not None:
        words += ["--out", str(arguments.out)]
    words += [word for name, value in overrides for word in (f"--{name}", value)]
    return shlex.join(words)
