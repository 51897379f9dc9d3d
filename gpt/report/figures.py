"""Charts as data: what plotly draws in a page, and what `sketch` draws without a script.

A figure is plotly's own JSON object with `data` and `layout`; no plotly is needed to make one. All
text in it is escaped, since plotly reads some tags.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt.history import Column
from gpt.plot import FAINT, INK, RATE, TRAIN, VAL
from gpt.report.markup import shown
from gpt.report.thin import rounded, thin

Figure = dict[str, Any]

PURPLE, GREY = "#CC79A7", "#7F7F7F"
# Each line has a dash of its own besides, so that nothing is told by colour alone.
COLORS = (TRAIN, VAL, RATE, PURPLE, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
HEIGHT = 300
_ROW_HEIGHT, _LEAST_ROWS = 15, 8
# What each colour of the light page becomes on the dark one.
DARK = {
    TRAIN: "#5BB8F0",
    VAL: "#F2885A",
    RATE: "#35C79A",
    PURPLE: "#E5A8CB",
    GREY: "#A0A6AD",
    INK: "#D5D9DE",
    FAINT: "#30363D",
    "#FFFFFF": "#14171A",
}


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Attributes:
        label: what the legend calls it.
        steps: the optimizer steps.
        values: one each; those that are not finite are left out.
        color: of the line.
        dash: plotly's name of its dash.
        width: in pixels.
        faint: whether it stands behind the others, out of the legend if it has no label.
        markers: whether each point is marked.
    """

    label: str
    steps: Column
    values: Column
    color: str = TRAIN
    dash: str = "solid"
    width: float = 1.8
    faint: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure with the words that go with it.

    Attributes:
        id: unique in the page.
        title: its heading.
        about: what is drawn, in a sentence.
        figure: for plotly.
        summary: what it shows, in numbers, for who does not see it.
        switches: axes that can be made logarithmic: `x`, `y`.
        wide: whether it takes the page's whole width.
    """

    id: str
    title: str
    about: str
    figure: Figure
    summary: str
    switches: tuple[str, ...] = ()
    wide: bool = False


def style(number: int) -> tuple[str, str]:
    """Colour and dash of line `number` of a chart; both change from one to the next."""
    count = len(COLORS)
    return COLORS[number % count], DASHES[(number + number // count) % len(DASHES)]


def plain(text: str) -> str:
    """Text that plotly shows as it is."""
    return html.escape(shown(text), quote=False)


def line_figure(
    lines: Sequence[Line],
    y_title: str,
    *,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    limits: Sequence[tuple[str, float]] = (),
    height: int = HEIGHT,
) -> Figure:
    """Lines over the optimizer step; `limits` are level lines with a label."""
    drawn = [_trace(line) for line in lines]
    figure: Figure = {
        "data": drawn,
        "layout": layout(
            "optimizer step",
            y_title,
            legend=sum(bool(line.label) for line in lines) > 1,
            height=height,
        ),
    }
    axis = figure["layout"]["yaxis"]
    if log_y:
        axis |= {"type": "log", "exponentformat": "power"}
        ends = [min(line.values.min() for line in lines), max(line.values.max() for line in lines)]
        if 0 < 8 * ends[0] < ends[1] < 300 * ends[0]:
            axis["dtick"] = "D2"  # 1, 2, 5
    elif y_range is not None:
        axis["range"] = [float(f"{end:.6g}") for end in y_range]
    for label, value in limits:
        figure["layout"]["shapes"].append(_level(label, value))
    return figure


def layout(x_title: str, y_title: str, *, legend: bool, height: int = HEIGHT) -> Figure:
    """What all charts share; colours are of the light page, its script has the dark ones."""
    axis: Figure = {
        "gridcolor": FAINT,
        "linecolor": FAINT,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
    }
    return {
        "height": height,
        "margin": {"l": 52, "r": 12, "t": 22, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 12, "family": "system-ui, sans-serif"},
        "xaxis": {**axis, "title": {"text": plain(x_title), "standoff": 6}, "tickformat": ",d"},
        "yaxis": {**axis, "title": {"text": plain(y_title), "standoff": 6}},
        "hovermode": "x unified",
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.08, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "shapes": [],
    }


def _trace(line: Line) -> Figure:
    steps, values = thin(line.steps, line.values)
    pointed = line.markers or len(steps) == 1
    trace: Figure = {
        "type": "scatter",
        "name": plain(line.label),
        "x": [int(step) if step == int(step) else float(step) for step in steps.tolist()],
        "y": rounded(values),
        "mode": "lines+markers" if pointed else "lines",
        "line": {"color": line.color, "width": line.width, "dash": line.dash},
        "hovertemplate": "%{y:.5g}",
    }
    if line.faint:
        trace["opacity"] = 0.35
    if not line.label:
        trace |= {"showlegend": False, "hoverinfo": "skip"}
        del trace["hovertemplate"]
    if pointed:
        trace["marker"] = {"size": 6, "color": line.color}
    return trace


def _level(label: str, value: float) -> Figure:
    level: Figure = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": {"color": GREY, "width": 1.4, "dash": "dash"},
    }
    if label:
        font = {"size": 11, "color": INK}
        where = {"textposition": "start", "yanchor": "bottom"}
        level["label"] = {"text": plain(label), "font": font, **where}
    return level


def map_figure(names: Sequence[str], steps: Column, values: Sequence[Column], unit: str) -> Figure:
    """A heat map of values over step and name, its colour logarithmic."""
    with np.errstate(divide="ignore", invalid="ignore"):
        grid = np.log10(np.array(values))
    ends = grid[np.isfinite(grid)]
    low, high = float(ends.min()), float(ends.max())
    ticks = _powers(low, high)
    figure: Figure = {
        "data": [
            {
                "type": "heatmap",
                "x": [int(step) for step in steps.tolist()],
                "y": [plain(name) for name in names],
                "z": [rounded(row, 4) for row in grid],
                "text": [[f"{value:.3g}" for value in row.tolist()] for row in values],
                "hovertemplate": "%{y}<br>step %{x:,d}: %{text}<extra></extra>",
                "hoverongaps": False,
                "colorscale": "Cividis",
                "zmin": low,
                "zmax": max(high, low + 1e-6),
                "colorbar": {
                    "orientation": "h",
                    "y": 1 + 1.6 / max(_LEAST_ROWS, len(names)),  # above the marks' numbers
                    "yanchor": "bottom",
                    "thickness": 10,
                    "title": {"text": plain(unit), "side": "top"},
                    "tickvals": [place for place, _ in ticks],
                    "ticktext": [text for _, text in ticks],
                },
            }
        ],
        "layout": layout(
            "optimizer step",
            "",
            legend=False,
            height=125 + _ROW_HEIGHT * max(_LEAST_ROWS, len(names)),
        ),
    }
    figure["layout"]["hovermode"] = "closest"
    figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    figure["layout"]["yaxis"]["tickfont"] = {"size": 10}
    return figure


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks of a colour bar in log10: whole powers of ten, else its ends."""
    whole = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    if len(whole) >= 2:
        every = -(-len(whole) // 6)
        return [(float(power), f"{10.0**power:g}") for power in whole[::every]]
    return [(end, f"{10**end:.2g}") for end in ([low, high] if high > low else [low])]


def mark_steps(figure: Figure, marks: Sequence[tuple[str, int]]) -> None:
    """Draws a dotted upright line at each mark's step, with its number."""
    for label, step in marks:
        figure["layout"]["shapes"].append(
            {
                "type": "line",
                "yref": "paper",
                "x0": step,
                "x1": step,
                "y0": 0,
                "y1": 1,
                "line": {"color": VAL, "width": 1.2, "dash": "dot"},
                "label": {
                    "text": plain(label),
                    "textposition": "end",
                    "textangle": 0,
                    "font": {"size": 11, "color": INK},
                },
            }
        )
