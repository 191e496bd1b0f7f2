"""Read what is written in a figure that code under test draws with matplotlib, and where."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest


class Drawn:
    """The figures that are drawn while this is in place, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.figures: list[Any] = []
        draw = FigureCanvasAgg.print_png

        def remember(canvas: Any, *arguments: Any, **named: Any) -> None:
            draw(canvas, *arguments, **named)
            self.figures.append(canvas.figure)

        monkeypatch.setattr(FigureCanvasAgg, "print_png", remember)


def texts(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is seen, and its box in pixels."""
    from matplotlib.text import Text

    unseen = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _beyond(axis)}
    found = [text for text in figure.findobj(Text) if text.get_visible() and id(text) not in unseen]
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text().strip()]


def _beyond(axis: Any) -> list[Any]:
    """Labels of ticks that are made but lie beyond the axis, so that they are not drawn."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    return [tick.label1 for tick in axis.get_major_ticks() if not low - slack <= tick.get_loc() <= high + slack]


def check_texts(figure: Any) -> None:
    """Every text lies within the figure, and none on another."""
    width, height = figure.canvas.get_width_height()
    placed = texts(figure)
    assert placed
    for words, box in placed:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{words!r} is clipped"
    for (first, a), (second, b) in combinations(placed, 2):
        # Boxes are those of whole lines: a pixel of two neighbours may be the same.
        across, along = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 1, f"{first!r} lies on {second!r}"
