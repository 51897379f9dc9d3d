"""The chapter's pictures, computed and not drawn: a lesson is a module that measures, draws, tells.

Each module here that is named after a lesson has `measure() -> numbers`, `explain(numbers,
language) -> lines` and `draw(numbers, language) -> figure`. They are imported when they are taught.
"""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from gpt.lr.lessons.words import Language, pick


class Lesson(NamedTuple):
    """The chapter's section that a lesson belongs to, and what it is about, in both languages."""

    section: str
    en: str
    zh: str


LESSONS = {
    "update-rule": Lesson("17.1", "one weight, one step", "一个权重,一步"),
    "one-step": Lesson("17.4", "one AdamW step on a real GPT", "真实 GPT 上的一步 AdamW"),
    "regimes": Lesson("17.2", "too small, right, too large", "太小、合适、太大"),
    "landscape": Lesson("17.2.3", "the loss around a trained GPT", "训练好的 GPT 周围的损失"),
    "optimizers": Lesson("17.5", "SGD, Adam and AdamW", "SGD、Adam 与 AdamW"),
    "decay": Lesson("17.7.3", "coupled and decoupled weight decay", "耦合与解耦的权重衰减"),
    "schedules": Lesson(
        "17.6", "nine schedules, and the chapter's T_max", "九种调度,以及书中的 T_max"
    ),
    "warmup": Lesson("17.6.4", "why warmup helps", "warmup 为什么有用"),
    "batch": Lesson(
        "17.7.1", "batch and rate: linear or square root", "批量与学习率:线性还是平方根"
    ),
}


def teach(name: str, folder: Path, language: Language) -> list[str]:
    """Computes a lesson, writes `folder/name.png`, and returns the lines to print.

    The labels are English where no font for Chinese is installed. Raises UserError if the picture
    cannot be written; never leaves half of one.
    """
    from gpt.lr.lessons.picture import font_for, label_language, save_picture
    from gpt.lr.lessons.side_by_side import one_thread

    lesson = import_module(f"gpt.lr.lessons.{name.replace('-', '_')}")
    with one_thread():
        numbers = lesson.measure()
    labels, picture = label_language(language), folder / f"{name}.png"
    with font_for(labels):
        save_picture(lesson.draw(numbers, labels), picture)
    return [heading(name, language), *lesson.explain(numbers, language), f"-> {picture}"]


def heading(name: str, language: Language) -> str:
    """A lesson's name, subject and section in a line."""
    section, en, zh = LESSONS[name]
    return f"{name}: " + pick(language, f"{en} (section {section})", f"{zh}({section} 节)")
