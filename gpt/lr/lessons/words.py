"""The two languages of the lessons."""

import textwrap
from typing import Literal

Language = Literal["en", "zh"]
WIDTH = 96


def pick(language: Language, en: str, zh: str) -> str:
    """The text in the language asked for."""
    return zh if language == "zh" else en


def paragraphs(language: Language, *texts: tuple[str, str]) -> list[str]:
    """Lines to print, from pairs of an English and a Chinese paragraph."""
    lines = []
    for en, zh in texts:
        lines += [zh] if language == "zh" else textwrap.wrap(en, WIDTH)
    return lines
