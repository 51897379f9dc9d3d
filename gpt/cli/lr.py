"""The command `gpt-lr`: the learning-rate desk. Each of its commands is a module of its own."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from gpt.cli.arguments import Parser, knobs_page, split_overrides
from gpt.cli.threads import wait_briefly_if_busy
from gpt.errors import UserError, run_command

COMMANDS = {
    "plan": "the run before step 1: parameters, memory, time, the rate drawn, and what looks wrong",
    "find": "the learning-rate finder: short runs on your own text, one rate, with an interval",
    "sweep": "full runs at several rates, side by side: too small, right, too large",
    "suggest": "published estimates of the rate for this size, with sources and spread",
    "scale": "what rate, betas and decay become at another batch, width, depth or length",
    "lessons": "the learning rate in pictures, computed while you wait",
}
WITHOUT_CONFIG = ("lessons",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_lr, argv)


def _lr(argv: Sequence[str]) -> None:
    rest, overrides = split_overrides(argv)
    name = next((word for word in rest if word in COMMANDS), None)
    arguments = _parser(name).parse_args(rest)
    if overrides and arguments.command in WITHOUT_CONFIG:
        raise UserError(
            f"gpt-lr {arguments.command}: --{overrides[0][0]}: it reads no config; leave that out"
        )
    from gpt.configfile import located  # here Ctrl-C ends in a line

    with located(getattr(arguments, "config", None), overrides):
        wait_briefly_if_busy()
        import_module(f"gpt.cli.lr_{arguments.command}").run(arguments, overrides)


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's options are read in, for speed."""
    parser = Parser(
        prog="gpt-lr",
        description="Which learning rate, why, and what it will do.",
    )
    page = knobs_page()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
        )
        if name not in WITHOUT_CONFIG:
            command.epilog = page
        if name == chosen:
            import_module(f"gpt.cli.lr_{name}").add_arguments(command)
    return parser
