"""The parser of all commands: a mistake is one line, as every other, and no option is guessed."""

import argparse
from typing import Any, NoReturn

from gpt.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError and keeps the line breaks of its texts."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 (argparse's own)
        """Takes what argparse takes."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")
