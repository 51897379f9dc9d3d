"""A chart as a still picture: what a page shows until its script has drawn, or without one."""

import html
import math
from collections.abc import Sequence

import numpy as np

from gpt.history import Column
from gpt.report.figures import Figure
from gpt.report.markup import Html, tag, together
from gpt.report.thin import thin

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 32, 28
_MOST_POINTS = 240
_DASHES = {"dash": "7 4", "dot": "2 4", "dashdot": "7 4 2 4", "longdash": "12 4"}
_TICKS = 4


def sketch(figure: Figure, label: str) -> Html | None:
    """An SVG picture of a figure of lines; None for another kind, or without a finite point."""
    lines = [trace for trace in figure["data"] if trace["type"] == "scatter" and trace["x"]]
    if not lines or len(lines) < len(figure["data"]):
        return None
    is_log = figure["layout"]["yaxis"].get("type") == "log"
    series = [_points(trace, is_log=is_log) for trace in lines]
    if not any(len(x) for x, _ in series):
        return None
    xs = np.concatenate([x for x, _ in series])
    ys = np.concatenate([y for _, y in series])
    given = figure["layout"]["yaxis"].get("range")
    low, high = given or (float(ys.min()), float(ys.max()))
    if figure["layout"]["yaxis"].get("rangemode") == "tozero":
        low = min(low, 0.0)
    frame = _Frame(_spread(float(xs.min()), float(xs.max())), _spread(low, high))
    drawn = [*_axes(frame, is_log=is_log), *_legend(lines)]
    for trace, (x, y) in zip(lines, series, strict=True):
        drawn.append(_mark(frame, trace, x, y) if _is_marks(trace) else _line(frame, trace, x, y))
    return tag(
        "svg",
        *drawn,
        class_="sketch",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
    )


class _Frame:
    """Where a value lies in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_ends, self.y_ends = x, y

    def x(self, value: float) -> float:
        low, high = self.x_ends
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ends
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _is_marks(trace: Figure) -> bool:
    return trace.get("meta") == "marks"


def _points(trace: Figure, *, is_log: bool) -> tuple[Column, Column]:
    x = np.array(trace["x"], float)
    y = np.array([math.nan if value is None else value for value in trace["y"]], float)
    if is_log:
        y = np.log10(np.where(y > 0, y, np.nan))
    return (x, y) if _is_marks(trace) else thin(x, y, _MOST_POINTS)


def _spread(low: float, high: float) -> tuple[float, float]:
    """Ends that are apart."""
    if high > low:
        return low, high
    margin = abs(low) * 0.05 or 1.0
    return low - margin, low + margin


def _axes(frame: _Frame, *, is_log: bool) -> list[Html]:
    drawn = []
    for value in _even(frame.y_ends) if is_log else _round(frame.y_ends):
        height = f"{frame.y(value):.1f}"
        shown = f"{10 ** min(value, 308):.2g}" if is_log else f"{value:.3g}"
        drawn.append(tag("path", d=f"M{_LEFT} {height}H{_WIDTH - _RIGHT}", class_="grid"))
        drawn.append(tag("text", shown, x=_LEFT - 6, y=height, class_="tick y"))
    for value in _round(frame.x_ends):
        place = f"{frame.x(value):.1f}"
        drawn.append(tag("text", f"{value:,g}", x=place, y=_HEIGHT - 8, class_="tick x"))
    return drawn


def _even(ends: Sequence[float]) -> list[float]:
    low, high = ends
    return [low + (high - low) * part / _TICKS for part in range(_TICKS + 1)]


def _round(ends: Sequence[float]) -> list[float]:
    """Round numbers between the ends, about _TICKS of them."""
    low, high = ends
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.99 * rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def _legend(lines: Sequence[Figure]) -> list[Html]:
    """Each line with its name, as many as fit beside each other."""
    drawn = []
    x = float(_LEFT)
    for trace in lines:
        name = html.unescape(trace["name"])
        if trace.get("showlegend") is False or _is_marks(trace):
            continue
        if x + 40 + 6 * len(name) > _WIDTH:
            break
        style = trace["line"]
        drawn.append(
            tag(
                "path",
                d=f"M{x:.0f} 14h24",
                stroke=style["color"],
                stroke_width=style["width"],
                stroke_dasharray=_DASHES.get(style["dash"]),
                opacity=trace.get("opacity"),
            )
        )
        drawn.append(tag("text", name, x=f"{x + 30:.0f}", y=14, class_="tick name"))
        x += 48 + 6 * len(name)
    return drawn if len(drawn) > 2 else []


def _line(frame: _Frame, trace: Figure, x: Column, y: Column) -> Html:
    places = [f"{frame.x(a):.1f} {frame.y(b):.1f}" for a, b in zip(x, y, strict=True)]
    style = trace["line"]
    if len(places) == 1:
        place = places[0].split()
        return tag("circle", cx=place[0], cy=place[1], r=3, fill=style["color"])
    return tag(
        "path",
        d=f"M{'L'.join(places)}" if places else None,
        fill="none",
        stroke=style["color"],
        stroke_width=style["width"],
        stroke_dasharray=_DASHES.get(style["dash"]),
        opacity=trace.get("opacity"),
    )


def _mark(frame: _Frame, trace: Figure, x: Column, y: Column) -> Html:
    """Numbered discs, each with the id that its finding's link goes to."""
    marks = []
    for step, height, text, numbers in zip(x, y, trace["text"], trace["customdata"], strict=True):
        cx = f"{frame.x(step):.1f}"
        cy = f"{frame.y(height if math.isfinite(height) else frame.y_ends[1]):.1f}"
        disc = tag("circle", cx=cx, cy=cy, r=9, fill=trace["marker"]["color"])
        marks.append(
            tag("g", disc, tag("text", text, x=cx, y=cy, class_="mark"), id=f"mark-{numbers[0]}")
        )
    return together(*marks)
