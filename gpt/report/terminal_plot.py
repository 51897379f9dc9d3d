"""The loss of a run, drawn in characters."""

from collections.abc import Sequence

import numpy as np

from gpt.history import History, finite
from gpt.plot import smooth
from gpt.report.charts import loss_range
from gpt.report.marks import Mark
from gpt.report.thin import thin

PLOT_WIDTH, PLOT_HEIGHT = 100, 16
NARROWEST = 36
# What the frame of a plot becomes on a terminal without line drawing.
_ASCII = str.maketrans("─│┌┐└┘├┤┬┴┼┊┈", "-|+++++++++:-")


def loss_plot(history: History, marks: Sequence[Mark], width: int, *, fancy: bool) -> list[str]:
    """Smoothed training loss as a line, validation as `o`, marks as upright lines with numbers.

    Nothing where the terminal is too narrow, or there are fewer than two points. `fancy`: the
    terminal has more than ASCII.
    """
    steps, losses = finite(history.train["step"], history.train["loss"])
    val_steps, vals = finite(history.evals["step"], history.evals["val_loss"])
    ends = loss_range(losses, vals)
    if width < NARROWEST or ends is None or len(losses) + len(vals) < 2:
        return []
    import plotext  # type: ignore[import-untyped]

    figure = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.plot_size(min(width, PLOT_WIDTH), PLOT_HEIGHT)
    figure.theme("colorless")
    last = max(history.last_step, 1)
    for mark in marks:
        figure.line(mark.step, "vertical", style="dotted")
    if len(losses):
        smoothed = np.array(smooth([int(step) for step in steps], losses.tolist()))
        x, y = thin(steps, np.clip(smoothed, *ends), 4 * width)
        curve = figure.signal(x.tolist(), y.tolist(), marker="braille" if fancy else "*")
        figure.draw(curve.lines())
    if len(vals):
        x, y = thin(val_steps, np.clip(vals, *ends), max(4, width // 4))
        figure.draw(figure.signal(x.tolist(), y.tolist(), marker="o"))
    for mark in marks:
        figure.draw(figure.text(mark.step, ends[1], mark.label, alignment="center"))
    up, along = figure.ruler("y"), figure.ruler("x")
    up.lim(*ends)
    along.lim(0, last)
    heights = np.linspace(*ends, 5).tolist()
    up.ticks(heights, [f"{height:.3g}" for height in heights])
    parts = 4 if width >= 2 * NARROWEST else 2
    places = [last * part // parts for part in range(parts + 1)]
    along.ticks(places, [f"{place:,}" for place in places])
    text: str = figure.build().string(colorless=True)
    figure.clear()
    text = text if fancy else text.translate(_ASCII)
    return [line.rstrip() for line in text.rstrip("\n").splitlines()]
