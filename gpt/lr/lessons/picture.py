"""How the lessons' pictures look, in which font, and how they reach the disk."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpt.errors import UserError
from gpt.files import write_durably
from gpt.lr.lessons.words import Language

# Okabe & Ito's palette, which stays apart for the colour-blind and in grey.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
INK, GREY, FAINT = "#333333", "#888888", "#DDDDDD"
# Families that hold simplified Chinese, on Linux, macOS and Windows.
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Noto Sans CJK JP",  # one file holds all of them, and is listed under its first family
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti TC",
    "STHeiti",
    "Microsoft YaHei",
    "SimHei",
    "DengXian",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)
_PROBE = "学习率损失权重热身衰减优化器批量,:"


def chinese_font() -> str | None:
    """The name of an installed font that can draw the lessons' Chinese labels, or None."""
    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    for name in CHINESE_FONTS:
        with suppress(OSError, RuntimeError, KeyError):  # not installed, or not readable
            glyphs = font_manager.get_font(installed[name]).get_charmap()
            if all(ord(character) in glyphs for character in _PROBE):
                return name
    return None


def label_language(language: Language) -> Language:
    """The language that the labels can be drawn in on this machine."""
    return "zh" if language == "zh" and chinese_font() else "en"


@contextmanager
def font_for(language: Language) -> Iterator[None]:
    """Draws and saves with fonts that hold all the glyphs of the labels."""
    chinese = chinese_font() if language == "zh" else None
    families = ["DejaVu Sans", *([chinese] if chinese else [])]
    with mpl.rc_context({"font.family": families, "text.color": INK, "axes.labelcolor": INK}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """The look that all the lessons' axes share."""
    if grid:
        axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.set_title(title, fontsize=10.5, color=INK)
    axes.set_xlabel(x, fontsize=9.5)
    axes.set_ylabel(y, fontsize=9.5)


def rate_ticks(axes: Axes, rates: Sequence[float]) -> None:
    """A logarithmic axis of rates whose only ticks are those that were tried."""
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def smoothed(losses: Sequence[float], half: int = 4) -> list[float]:
    """A moving average, symmetric but for the end; so narrow at the start that it stays sharp."""
    means = []
    for index in range(len(losses)):
        reach = min(half, index)
        means.append(fmean(losses[index - reach : index + reach + 1]))
    return means


def legend(axes: Axes, **options: object) -> None:
    """A legend without a frame that hides little."""
    options = {"fontsize": 8.5, "edgecolor": "none", "framealpha": 0.85} | options
    axes.legend(**options)


def save_picture(figure: Figure, path: Path) -> None:
    """Writes the PNG whole or not at all; raises UserError where the folder does not allow it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_durably(path, buffer.getvalue())
    except BaseException as error:
        with suppress(OSError):
            path.with_name(f".tmp-{path.name}").unlink()
        if isinstance(error, OSError):
            raise UserError(
                f"--out: {path} cannot be written: {error.strerror}; name another folder"
            ) from None
        raise
