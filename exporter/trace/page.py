"""A page for drawing with matplotlib; lengths are inches, the origin is the lower left corner."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dynexport.exporter.trace.colours import LIGHT

DPI = 150


@contextmanager
def looks(fonts: Sequence[str]) -> Iterator[None]:
    """Apply dynexport's style within the context, independent of the user's settings."""
    from matplotlib import style

    ours = {
        "font.family": list(fonts),
        "font.size": 8,
        "text.color": LIGHT.ink,
        "axes.edgecolor": LIGHT.line,
        "axes.linewidth": 0.6,
        "axes.labelcolor": LIGHT.soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": LIGHT.soft,
        "ytick.color": LIGHT.soft,
        "grid.color": LIGHT.frame,
        "legend.frameon": False,
    }
    with style.context(["default", ours]):
        yield


class Page:
    """A figure with axes and texts at given places; its size can be set after texts were measured."""

    def __init__(self, width: float = 1, height: float = 1) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure: Any = Figure(dpi=DPI)
        self._canvas: Any = FigureCanvasAgg(self.figure)
        self.resize(width, height)

    def resize(self, width: float, height: float) -> None:
        """Set the size; call it before any axes or text is placed."""
        self.width, self.height = width, height
        self.figure.set_size_inches(width, height)

    def axes(self, x: float, y: float, width: float, height: float, **more: Any) -> Any:
        """Add axes whose lower left corner is (x, y)."""
        place = x / self.width, y / self.height, width / self.width, height / self.height
        return self.figure.add_axes(place, **more)

    def text(self, x: float, y: float, words: str, **more: Any) -> None:
        """Add a line of text that begins at (x, y); dollar signs are plain text."""
        self.figure.text(x / self.width, y / self.height, words, parse_math=False, **more)

    def head(self, edge: float, title: str, facts: str) -> None:
        """Add a title, cut to the page's width, and a line below it."""
        self.text(edge, self.height - 0.37, self._fitted(title, self.width - 2 * edge), **_TITLE)
        self.text(edge, self.height - 0.59, facts, color=LIGHT.soft)

    def longest(self, lines: Iterable[str], **font: Any) -> float:
        """Return the width of the longest line in a font such as ``size=8``; 0 without lines."""
        from matplotlib.font_manager import FontProperties

        properties, renderer = FontProperties(**font), self._canvas.get_renderer()
        lengths = (renderer.get_text_width_height_descent(words, properties, False)[0] for words in lines)
        return float(max(lengths, default=0)) / DPI

    def _fitted(self, words: str, room: float) -> str:
        if self.longest([words], **_TITLE) <= room:
            return words
        while len(words) > 1 and self.longest([f"{words}…"], **_TITLE) > room:
            words = words[:-1]
        return f"{words}…"

    def png(self) -> bytes:
        """Return the page as a PNG file's content."""
        content = io.BytesIO()
        self._canvas.print_png(content, metadata={"Software": None})
        return content.getvalue()


_TITLE = {"size": 11, "weight": "bold"}
