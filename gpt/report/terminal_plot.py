"""The loss of a run, drawn in characters."""

from collections.abc import Sequence

import numpy as np

from gpt.history import History, finite
from gpt.plot import smooth
from gpt.report.charts import loss_range
from gpt.report.marks import Mark
from gpt.report.thin import thin
from gpt.textplot import TextPlot

PLOT_WIDTH, PLOT_HEIGHT = 100, 16
NARROWEST = 36


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
    plot = TextPlot(min(width, PLOT_WIDTH), PLOT_HEIGHT, max(history.last_step, 1), fancy=fancy)
    figure = plot.figure
    for mark in marks:
        figure.line(mark.step, "vertical", style="dotted")
    if len(losses):
        smoothed = np.array(smooth([int(step) for step in steps], losses.tolist()))
        x, y = thin(steps, np.clip(smoothed, *ends), 4 * width)
        curve = figure.signal(x.tolist(), y.tolist(), marker=plot.marker)
        figure.draw(curve.lines())
    if len(vals):
        x, y = thin(val_steps, np.clip(vals, *ends), max(4, width // 4))
        figure.draw(figure.signal(x.tolist(), y.tolist(), marker="o"))
    for mark in marks:
        figure.draw(figure.text(mark.step, ends[1], mark.label, alignment="center"))
    return plot.lines(ends[1], ends, 3)
