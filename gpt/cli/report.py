"""The command `gpt-report`: how a run did, in words, in numbers, as a page."""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.cli.arguments import Parser
from gpt.errors import EXIT_FINDINGS, UserError, run_command, say

if TYPE_CHECKING:
    from gpt.report.judged import Judged

WIDTH = 100
EVERY_S = 5.0
LEAST_RELOAD_S = 2.0  # a page that reloads more often can hardly be read
MOST_STEPS = 10**7
_CLEAR = "\x1b[H\x1b[2J"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_report, argv)


def _report(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    runs = _watch(arguments) if arguments.watch else _once(arguments)
    return EXIT_FINDINGS if any(run.findings for run in runs) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpt-report",
        description="How a run did: findings with evidence, likely cause and the next command. "
        "Several runs are compared, with intervals.",
        epilog="Exit code: 0 healthy, 3 with findings, 2 for a mistake in the call.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run directory (runs/NAME), or a log that another program wrote",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with plots, one file (default for a run of ours: its report.html)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--watch", action="store_true", help="show it anew while the run goes on; Ctrl-C ends it"
    )
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        help=f"how often --watch looks (default {EVERY_S:g})",
    )
    parser.add_argument(
        "--probe",
        choices=("cooldown", "double"),
        help="train on from the newest checkpoint, in memory, and see: cooldown: what the loss "
        "would be if the rate came down now; double: whether twice the rate would do better",
    )
    parser.add_argument("--steps", metavar="N", help="steps of the probe")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, and reads the numbers."""
    if arguments.every is not None and not arguments.watch:
        raise UserError(f"--every {arguments.every}: only --watch looks again; add --watch")
    if arguments.steps is not None and arguments.probe is None:
        raise UserError(f"--steps {arguments.steps}: only a probe takes steps; add --probe double")
    if arguments.probe is not None and len(arguments.runs) > 1:
        raise UserError(f"--probe: one run at a time, {len(arguments.runs)} are given; give one")
    if arguments.probe is not None and arguments.watch:
        raise UserError("--probe: it is made once, --watch goes on; leave one of them out")
    if arguments.html is not None and arguments.html.is_dir():
        raise UserError(f"--html {arguments.html}: is a folder; give a file in it")
    arguments.every = _seconds(arguments.every) if arguments.every is not None else EVERY_S
    arguments.steps = _steps(arguments.steps) if arguments.steps is not None else None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86_400:
        raise UserError(f"--every {text}: not a number of seconds from 0.1 to 86,400")
    return seconds


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        steps = 0
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"--steps {text}: not a number of steps from 1 to {MOST_STEPS:,}")
    return steps


def _once(arguments: argparse.Namespace) -> "list[Judged]":
    """Reads, judges, probes where asked for, and shows."""
    from gpt.report.judged import judge, open_history

    runs = [judge(open_history(path)) for path in arguments.runs]
    probe: Any = None
    if arguments.probe is not None:
        from gpt.report.probe import probe as run_probe

        probe = run_probe(arguments.runs[0], arguments.probe, arguments.steps)
    notes = list(probe.lines()) if probe is not None else []
    if arguments.json:
        from gpt.report.answer import answer

        print(answer(runs, probe.json() if probe is not None else None))
    else:
        print("\n".join([*_page(runs), *([""] if notes else []), *notes]))
    if arguments.html is not None:
        _write(arguments.html, runs, notes=["\n".join(notes)] if notes else [])
        say(f"wrote {arguments.html}")
    elif probe is None and len(runs) == 1 and (arguments.runs[0] / "config.yaml").is_file():
        _refresh(arguments.runs[0] / "report.html", runs)
    return runs


def _refresh(page: Path, runs: "list[Judged]") -> None:
    """Writes a run's own page, where its folder takes one."""
    try:
        _write(page, runs)
    except UserError:
        return  # somebody else's run: it was read, and that was asked for
    say(f"wrote {page}")


def _watch(arguments: argparse.Namespace) -> "list[Judged]":
    """Shows the runs until they end; on a terminal in place, in a pipe a line at a time."""
    from gpt.report.answer import answer
    from gpt.report.watch import watch
    from gpt.report.words import progress

    live = sys.stdout.isatty() and not arguments.json
    every: float = arguments.every

    def show(runs: "Sequence[Judged]") -> None:
        if arguments.json:
            print(answer(runs), flush=True)
        elif live:
            now = datetime.now().astimezone().strftime("%H:%M:%S")
            rest = f"watching; read at {now}, looks every {every:g} s; Ctrl-C ends it"
            print(_CLEAR + "\n".join([*_page(runs), "", rest]), flush=True)
        else:
            print("\n".join(progress(run) for run in runs), flush=True)
        if arguments.html is not None:
            _write(arguments.html, runs, reload_s=max(every, LEAST_RELOAD_S))

    def wait(missing: Sequence[Path]) -> None:
        names = ", ".join(str(path) for path in missing)
        say(f"waiting for {names}: nothing is logged yet; Ctrl-C ends it")

    runs = watch(arguments.runs, show, wait, every_s=every)
    if runs and not arguments.json:
        print((_CLEAR if live else "") + "\n".join(_page(runs)))
    if runs and arguments.html is not None:
        _write(arguments.html, runs)
        say(f"wrote {arguments.html}")
    return runs


def _page(runs: "Sequence[Judged]") -> list[str]:
    from gpt.report.terminal import run_page, runs_page

    width = shutil.get_terminal_size((WIDTH, 24)).columns
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    if len(runs) == 1:
        return list(run_page(runs[0], width, fancy=encoding.startswith("utf")))
    return list(runs_page(runs, width))


def _write(
    html: Path,
    runs: "Sequence[Judged]",
    *,
    reload_s: float | None = None,
    notes: Sequence[str] = (),
) -> None:
    from gpt.report.page import write_page

    try:
        write_page(html, runs, reload_s=reload_s, notes=notes)
    except OSError as error:
        raise UserError(
            f"--html {html}: cannot be written ({error.strerror or error}); give another place"
        ) from None
