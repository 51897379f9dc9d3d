"""The parser of all commands: a mistake is one line, as every other, and no option is guessed.

Imports neither the config classes nor what they are made with: `--help` is there at once.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt.errors import UserError

# As `gpt.ratepolicy` has them.
RATE_POLICIES = ("keep", "extend", "rewarm", "override")
_KNOBS = Path(__file__).with_name("knobs.txt")


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError and keeps the line breaks of its texts."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 (argparse's own)
        """Takes what argparse takes."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        if found := re.fullmatch(r"argument ([^:]*): expected one argument", message):
            option = next(name for name in found[1].split("/") if name.startswith("--"))
            message = f"{option} needs a value; one that begins with - is written {option}=VALUE"
        raise UserError(f"{message}; see {self.prog} --help")


def knobs_page() -> str:
    """Every config key with its type, default and description; `make schema` writes the page."""
    return _KNOBS.read_text(encoding="utf-8")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--section.key VALUE` and `--section.key=VALUE` out of a command line.

    Returns what is left for argparse, and the overrides. Raises UserError for one without a value.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                raise UserError(f"command line: {word} needs a value: {word} VALUE")
            value = following
        overrides.append((name, value))
    return rest, overrides
