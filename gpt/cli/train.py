"""The command `gpt-train`: arguments in, a trained run out. Imports torch only when work begins."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gpt.cli.arguments import RATE_POLICIES, Parser, knobs_page, split_overrides
from gpt.cli.threads import wait_briefly_if_busy
from gpt.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_train, argv)


def _train(argv: Sequence[str]) -> None:
    rest, overrides = split_overrides(argv)
    arguments = _parser().parse_args(rest)
    from gpt.configfile import load_config, located  # here Ctrl-C ends in a line

    config = load_config(arguments.config, overrides)
    wait_briefly_if_busy()
    with located(arguments.config, overrides):
        if arguments.dry_run:
            from gpt.build import dry_run

            print("\n".join(dry_run(config, arguments.resume, arguments.rate)))
        else:
            from gpt.ahead import DataAhead

            may = arguments.resume != "must" and arguments.rate == "keep"
            with DataAhead(config, may=may) as ahead:
                from gpt.train import train

                train(config, resume=arguments.resume, rate=arguments.rate, open_text=ahead.open)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpt-train",
        description="Trains a GPT as a YAML config says, or goes on where the run stopped.",
        epilog=knobs_page(),
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto (default): go on from the newest whole checkpoint, if any; never: refuse if "
        "there is one; must: refuse if there is none",
    )
    parser.add_argument(
        "--rate",
        choices=RATE_POLICIES,
        default="keep",
        help="what may change of the rate where the run goes on. keep (default): nothing; extend: "
        "the length; rewarm: lr, schedule and length, and the schedule begins anew there; "
        "override: lr, schedule, length, decay, betas, eps, momentum and grad_clip, as if they had "
        "been so from the start. Say it once: the run goes on so from then on",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, touch nothing"
    )
    return parser
