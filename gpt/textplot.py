"""The frame of a plot in characters: what the plots of losses and of a planned rate share."""

from typing import Any

import numpy as np

# What the frame of a plot becomes on a terminal without line drawing.
_ASCII = str.maketrans("─│┌┐└┘├┤┬┴┼┊┈", "-|+++++++++:-")
_WIDE = 70  # columns that have room for five numbers along the bottom


class TextPlot:
    """A plot of so many columns and lines over the steps 0 to `last`.

    `figure` is plotext's, to draw into; `marker` is the point of a line. `fancy`: the terminal has
    more than ASCII.
    """

    def __init__(self, width: int, height: int, last: int, *, fancy: bool) -> None:
        """Clears plotext's figure, of which there is only one."""
        import plotext  # type: ignore[import-untyped]

        self._width, self._last, self._fancy = width, last, fancy
        self.marker = "braille" if fancy else "*"
        self.figure: Any = plotext.figure
        self.figure.clear()
        plotext.terminal.limit(False, False)
        self.figure.plot_size(width, height)
        self.figure.theme("colorless")

    def lines(self, top: float, marked: tuple[float, float], digits: int) -> list[str]:
        """The finished plot, up to `top`; beside it five numbers, evenly between those `marked`."""
        up, along = self.figure.ruler("y"), self.figure.ruler("x")
        up.lim(marked[0], top)
        along.lim(0, self._last)
        heights = np.linspace(*marked, 5).tolist()
        up.ticks(heights, [f"{height:.{digits}g}" for height in heights])
        parts = 4 if self._width >= _WIDE else 2
        places = [self._last * part // parts for part in range(parts + 1)]
        along.ticks(places, [f"{place:,}" for place in places])
        text: str = self.figure.build().string(colorless=True)
        self.figure.clear()
        text = text if self._fancy else text.translate(_ASCII)
        return [line.rstrip() for line in text.rstrip("\n").splitlines()]
