"""Draw a trace as a PNG: tokens against layers, the share of tokens per layer, and a histogram of depths.

All lengths are inches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dynexport.exporter.trace import look
from dynexport.exporter.trace.colours import LIGHT, RAN, ROUTED_RAN, SKIPPED, legible, ran
from dynexport.exporter.trace.model import Trace
from dynexport.exporter.trace.page import Page, looks
from dynexport.runtime.bundle.errors import require_module

_LEFT, _RIGHT, _HEAD, _FOOT, _EDGE = 0.8, 1.75, 1.02, 0.5, 0.3
_CELL, _WIDEST_CELL, _NARROW_GRID, _WIDEST_GRID = 0.21, 0.6, 5.0, 24.0
_ROW, _HIGHEST_GRID = 0.27, 12.0
_SMALLEST_GAPPED_CELL = 0.06
# Relative width and height of a cell whose token did not run.
_SKIPPED_CELL = 0.55
_SMALLEST_NUMBERED_CELL = 0.13
_LINE_OF_TEXT, _SMALL = 0.14, 7.5
_HISTOGRAM = (3.6, 1.3)
_KEYS_WIDTH, _COLOURS_WIDTH = 1.95, 3.3
# Fallback fonts after matplotlib's own, used if installed.
_MORE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "Noto Sans",
    "Noto Emoji",
    "Arial Unicode MS",
)


def require() -> None:
    """Check that matplotlib is installed.

    Raises:
        DynexportError: if it is missing; the message says how to install it.
    """
    require_module("matplotlib", "pictures", "draw a trace as PNG")


def render(trace: Trace) -> bytes:
    """Return the PNG file's content.

    Raises:
        DynexportError: if matplotlib is missing.
    """
    require()
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]
    with looks(fonts):
        return _Picture(trace, fonts).png()


class _Picture:
    """The picture of a trace: a head, the grid with token labels below it, and the histogram at the bottom."""

    def __init__(self, trace: Trace, fonts: list[str]) -> None:
        self._trace, self._page, tokens = trace, Page(), len(trace.tokens)
        self._cell = min(max(_CELL, min(_WIDEST_CELL, _NARROW_GRID / tokens)), _WIDEST_GRID / tokens)
        self._row = min(_ROW, _HIGHEST_GRID / trace.layers)
        self._grid_width, self._grid_height = self._cell * tokens, self._row * trace.layers
        self._labels = _labels(trace, math.ceil(_LINE_OF_TEXT / self._cell), fonts)
        self._grid_y = _FOOT + _HISTOGRAM[1] + 0.45 + self._page.longest(self._labels.values(), size=_SMALL)
        width = _LEFT + max(self._grid_width + _RIGHT, _HISTOGRAM[0] + _KEYS_WIDTH + _COLOURS_WIDTH) + _EDGE
        self._page.resize(width, self._grid_y + self._grid_height + _HEAD)

    def png(self) -> bytes:
        """Draw all parts and return the PNG file's content."""
        self._page.head(_EDGE, look.headline(self._trace), look.facts(self._trace))
        self._grid()
        self._shares()
        self._histogram()
        self._colours()
        return self._page.png()

    def _grid(self) -> None:
        tokens, layers = len(self._trace.tokens), self._trace.layers
        axes = self._page.axes(_LEFT, self._grid_y, self._grid_width, self._grid_height)
        palette = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in LIGHT.palette], np.uint8)
        places = look.cells(self._trace)
        cells, skipped = palette[places], ~np.isin(places, [place for place in range(len(palette)) if ran(place)])
        smallest = min(self._cell, self._row)
        if smallest >= _SMALLEST_GAPPED_CELL:
            self._shrink(axes, skipped, palette[places[skipped]])
            cells[skipped] = 255
        # Layer 0 is at the bottom.
        axes.imshow(cells, aspect="auto", origin="lower", interpolation_stage="rgba")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if smallest >= _SMALLEST_GAPPED_CELL:
            gap = {"colors": "white", "linewidths": min(1.6, 10 * smallest)}
            axes.vlines(np.arange(1, tokens) - 0.5, -0.5, layers - 0.5, **gap)
            axes.hlines(np.arange(1, layers) - 0.5, -0.5, tokens - 0.5, **gap)
        self._number_steps(axes)
        self._name_tokens(axes)
        self._name_layers(axes)
        self._mark_the_prompt(axes)

    def _shrink(self, axes: Any, cells: np.ndarray, colours: np.ndarray) -> None:
        """Draw smaller cells where tokens did not run, so that the difference does not depend on colour."""
        from matplotlib.collections import PolyCollection

        centres = np.argwhere(cells)[:, None, ::-1]
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * _SKIPPED_CELL / 2
        axes.add_collection(PolyCollection(list(centres + corners), facecolors=colours / 255), autolim=False)

    def _number_steps(self, axes: Any) -> None:
        """Write the hops into the cells of tokens with paths, if the cells are large enough."""
        if min(self._cell, self._row) < _SMALLEST_NUMBERED_CELL:
            return
        places = look.cells(self._trace)
        for (layer, token), words in look.steps(self._trace).items():
            size = min(_SMALL, 72 * self._cell / (0.6 * len(words) + 0.2))
            colour = legible(LIGHT.palette[places[layer, token]])
            axes.text(token, layer, words, ha="center", va="center_baseline", size=size, color=colour)

    def _name_tokens(self, axes: Any) -> None:
        # parse_math=False: a token may contain dollar signs.
        axes.set_xticks(list(self._labels), list(self._labels.values()), rotation=90, size=_SMALL, parse_math=False)
        for place, words in zip(self._labels, axes.get_xticklabels(), strict=True):
            words.set_color(LIGHT.soft if self._trace.tokens[place].is_prompt else LIGHT.ink)

    def _name_layers(self, axes: Any) -> None:
        routed = {layer.layer for layer in self._trace.routed}
        axes.set_yticks(self._named_layers, [f"◆ {i}" if i in routed else str(i) for i in self._named_layers])
        for layer, words in zip(self._named_layers, axes.get_yticklabels(), strict=True):
            if layer in routed:
                words.set(color=LIGHT.accent, weight="bold")
        axes.set_ylabel("layer")

    @property
    def _named_layers(self) -> range:
        # With an odd distance, layers of both kinds are labelled if every other layer is routed.
        return range(0, self._trace.layers, math.ceil(_LINE_OF_TEXT / self._row) | 1)

    def _mark_the_prompt(self, axes: Any) -> None:
        """Draw a line at the end of the prompt, with a label on each side."""
        prompt, y = self._trace.prompt_tokens, self._grid_y + self._grid_height + 0.09
        x = _LEFT + prompt * self._cell
        self._page.text(x - 0.07, y, "prompt", color=LIGHT.soft, ha="right", weight="bold")
        if prompt < len(self._trace.tokens):
            self._page.text(x + 0.07, y, "generated", color=LIGHT.generated, weight="bold")
            axes.axvline(prompt - 0.5, ymax=1 + 0.22 / self._grid_height, color=LIGHT.ink, lw=1.2, clip_on=False)

    def _shares(self) -> None:
        """Draw the share of tokens that ran in each layer, to the right of the grid."""
        trace, x = self._trace, _LEFT + self._grid_width + 0.15
        routed = {layer.layer: layer for layer in trace.routed}
        shares = np.array(trace.ran, bool).mean(1)
        axes = self._page.axes(x, self._grid_y, 0.7, self._grid_height)
        colours = [LIGHT.palette[ROUTED_RAN[3] if i in routed else RAN] for i in range(trace.layers)]
        axes.barh(range(trace.layers), 1, 0.72, color=LIGHT.palette[SKIPPED])
        axes.barh(range(trace.layers), shares, 0.72, color=colours)
        axes.set(xlim=(0, 1), ylim=(-0.5, trace.layers - 0.5), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        for layer in self._named_layers:
            words = f"{100 * shares[layer]:.0f} %{look.overflow(routed[layer]) if layer in routed else ''}"
            axes.text(1.08, layer, words, va="center_baseline", size=_SMALL, color=LIGHT.soft)
        self._page.text(x, self._grid_y - 0.17, "share that ran", color=LIGHT.soft)

    def _histogram(self) -> None:
        """Draw the histogram of depths at the bottom."""
        trace, most = self._trace, max(self._trace.layers, *self._trace.depth)
        axes = self._page.axes(_LEFT, _FOOT, *_HISTOGRAM)
        base = np.zeros(most + 1)
        looks = {"color": LIGHT.prompt, "hatch": "/////"}, {"color": LIGHT.generated}
        for (name, depths), look_of in zip(look.depths(trace).items(), looks, strict=True):
            if depths:
                counts = np.bincount(depths, minlength=most + 1)
                words = f"{name}, mean {sum(depths) / len(depths):.1f}"
                axes.bar(range(most + 1), counts, 0.82, bottom=base, label=words, ec="white", lw=0, **look_of)
                base += counts
        mean = trace.layers_per_token
        axes.axvline(mean, color=LIGHT.ink, lw=1, ls=(0, (4, 3)), label=f"mean {mean:.1f}")
        axes.set(xlim=(-0.6, most + 0.6), xlabel="layers that a token ran in", ylabel="tokens")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4, min_n_ticks=1)
        axes.tick_params(length=2)
        axes.legend(loc="upper left", bbox_to_anchor=(1.04, 1.03), frameon=False, handlelength=1.3, borderaxespad=0)

    def _colours(self) -> None:
        """Draw the legend of the grid's colours."""
        height, box = _HISTOGRAM[1], 0.13
        axes = self._page.axes(_LEFT + _HISTOGRAM[0] + _KEYS_WIDTH, _FOOT, _COLOURS_WIDTH, height)
        axes.set(xlim=(0, _COLOURS_WIDTH), ylim=(0, height))
        axes.axis("off")
        meanings = look.meanings(self._trace)
        widest = max(len(places) for places, _ in meanings)
        for number, (places, words) in enumerate(meanings):
            y = height - 0.1 - 0.2 * number
            for column, place in enumerate(places, start=widest - len(places)):
                side = box if ran(place) else box * _SKIPPED_CELL
                axes.barh(y, side, side, left=box * (column + 0.5) - side / 2, color=LIGHT.palette[place])
            axes.text(box * widest + 0.1, y, words, va="center_baseline")


def _labels(trace: Trace, every: int, fonts: list[str]) -> dict[int, str]:
    """Return place -> label of every ``every``-th token; a label is the id if the fonts lack a character.

    If ``every`` is more than 1, the label also has the token's place.
    """
    from matplotlib.font_manager import findfont, get_font

    faces = [get_font(findfont(name)) for name in fonts]
    labels = {}
    for place in range(0, len(trace.tokens), every):
        words = look.label(trace.tokens[place])
        if not all(any(face.get_char_index(ord(c)) for face in faces) for c in words):
            words = f"#{trace.tokens[place].id}"
        labels[place] = words if every == 1 else f"{words} {place}"
    return labels
