"""The command `gpt-report`: how a run did, in words, in numbers, as a page."""

from collections.abc import Sequence

from gpt.errors import UserError, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_report, argv)


def _report(argv: Sequence[str]) -> None:
    raise UserError("gpt-report: not built yet")
