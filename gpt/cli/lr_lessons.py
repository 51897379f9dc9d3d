"""`gpt-lr lessons`: the chapter's pictures, computed while you wait."""

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.errors import UserError, say
from gpt.lr.lessons import LESSONS, heading
from gpt.lr.lessons.words import Language

if TYPE_CHECKING:
    from gpt.configfile import Override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    width = max(map(len, LESSONS))
    rows = [
        f"  {name:<{width}}  {lesson.section:<7} {lesson.en}" for name, lesson in LESSONS.items()
    ]
    parser.epilog = "\n".join(
        [
            "lessons, with the chapter's sections:",
            *rows,
            "",
            "Each prints what it measured and writes NAME.png. The tiny GPTs in them are trained",
            "on the spot, on Python's own library; nothing is downloaded, nothing else is left",
            "behind. All of them take under three minutes on two CPU cores.",
        ]
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="one lesson (default: all of them)")
    add("--out", type=Path, default=Path("lessons"), metavar="DIR", help="default: lessons")
    add(
        "--language",
        default="en",
        metavar="LANG",
        help="en or zh, for text and labels (default: en)",
    )


def run(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> None:
    """Teaches one lesson or all; the text goes to stdout, the progress to stderr."""
    assert not overrides, "gpt-lr refuses them for commands without a config"
    names, language = chosen_lessons(arguments.name), chosen_language(arguments.language)
    out = writable_folder(arguments.out)

    from gpt.lr.lessons import teach
    from gpt.lr.lessons.picture import label_language

    if label_language(language) != language:
        say(
            "提示:本机没有 matplotlib 可用的中文字体(如 Noto Sans CJK SC),图中标注用英文,文字仍为"
            "中文。"
        )
    for number, name in enumerate(names, start=1):
        say(f"lesson {number}/{len(names)}  {heading(name, language)}")
        print(*teach(name, out, language), "", sep="\n", flush=True)


def writable_folder(path: Path) -> Path:
    """The folder, made if need be; raises UserError before any work if pictures cannot go there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: {path} cannot be made a folder: {error.strerror}; name another one"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--out: {path} cannot be written to; name another folder")
    return path


def chosen_lessons(name: str | None) -> list[str]:
    """The lessons to teach; raises UserError for a name that there is not."""
    if name is None:
        return list(LESSONS)
    if name not in LESSONS:
        near = difflib.get_close_matches(name, LESSONS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"gpt-lr lessons: there is no lesson {name!r}; {hint}there are {', '.join(LESSONS)}"
        )
    return [name]


def chosen_language(language: str) -> Language:
    """The language; raises UserError for one that there is not."""
    if language not in ("en", "zh"):
        raise UserError(f"--language {language}: not en (English) or zh (中文); en is the default")
    return "zh" if language == "zh" else "en"
