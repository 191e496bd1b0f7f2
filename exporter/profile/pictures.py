"""Draw a profile as PNGs: contributions per token, medians per layer, and sparsity by threshold.

All lengths are inches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dynexport.exporter.profile.measurement import Measured
from dynexport.exporter.profile.model import Contribution, Profile, all_blocks
from dynexport.exporter.trace import look
from dynexport.exporter.trace.colours import LIGHT, SERIES
from dynexport.exporter.trace.model import Token
from dynexport.exporter.trace.page import Page, looks
from dynexport.runtime.bundle.errors import require_module

OF_INPUT, OF_OUTPUT = "‖R(x)‖ / ‖x‖", "‖R(x)‖ / ‖x + R(x)‖"
INFLUENCE = "1 - cos(x, x + R(x))"
NAMES = ("heatmap.png", "medians.png", "sparsity.png")
# Number of tokens in the heat map.
SHOWN = 256

_FONT = "DejaVu Sans"
_EDGE, _HEAD, _SMALL, _LABEL, _LINE_OF_TEXT = 0.3, 0.75, 7.5, 6.5, 0.14
_CELL, _WIDEST_CELL, _NARROW_GRID, _WIDEST_GRID = 0.06, 0.4, 5.0, 15.0
_ROW, _LOWEST_GRID, _HIGHEST_GRID = 0.14, 1.2, 6.0
# Smaller contributions are drawn as this value.
_SMALLEST = 1e-6
# Small contributions are light, large ones dark.
_SCALE = "cividis_r"
_MARKERS, _DASHES = ("o", "s"), ("-", (0, (5, 2)))


def require() -> None:
    """Check that matplotlib is installed.

    Raises:
        DynexportError: if it is missing; the message says how to install it.
    """
    require_module("matplotlib", "pictures", "draw a profile")


def render(profile: Profile, measured: Measured, tokens: tuple[Token, ...], title: str) -> dict[str, bytes]:
    """Draw all pictures.

    Args:
        profile: the summary to draw.
        measured: the values per token.
        tokens: the first tokens of the text, for labels; at most ``SHOWN`` are used.
        title: the name of the profiled model.

    Returns:
        File name -> content.

    Raises:
        DynexportError: if matplotlib is missing.
    """
    require()
    with looks([_FONT]):
        contents = (
            _heatmap(measured, tokens[:SHOWN], title),
            _medians(profile, title),
            _sparsity(profile, measured, title),
        )
    return dict(zip(NAMES, contents, strict=True))


def _spoken(block: str) -> str:
    return block.replace("mlp", "MLP")


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.4g} %"


def _name_decades(axis: Any, words: Callable[[float, Any], str]) -> None:
    """Label 1, 2 and 5 of every decade on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(words)


def _heatmap(measured: Measured, tokens: tuple[Token, ...], title: str) -> bytes:
    """Draw one panel of layers against tokens per residual block, with a common colour scale."""
    blocks = {name: ratios.of_output[:, : len(tokens)] for name, ratios in measured.blocks.items()}
    width = min(_WIDEST_CELL * len(tokens), max(_NARROW_GRID, min(_WIDEST_GRID, _CELL * len(tokens))))
    height = max(_LOWEST_GRID, min(_ROW * len(measured.influence), _HIGHEST_GRID))
    page, left, gap = Page(), 0.8, 0.4
    labels = _labels(tokens, math.ceil(_LINE_OF_TEXT * len(tokens) / width))
    foot = 0.35 + page.longest(labels.values(), size=_LABEL)
    tall = len(blocks) * (height + gap) - gap
    page.resize(max(left + width + 1.2, 6.5), foot + tall + 0.3 + _HEAD)
    facts = f"{OF_OUTPUT} of the first {len(tokens)} tokens; colours are logarithmic"
    page.head(_EDGE, f"Contribution of every residual block: {title}", facts)
    colours = _colours(np.stack(list(blocks.values())))
    for number, (name, values) in enumerate(blocks.items()):
        axes = page.axes(left, foot + number * (height + gap), width, height)
        # Layer 0 is at the bottom.
        image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", **colours)
        axes.spines[:].set_visible(False)
        axes.set(ylabel="layer", xticks=[])
        axes.set_title(_spoken(name), loc="left", size=9, weight="bold", pad=4)
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for start in range(measured.window, len(tokens), measured.window):
            axes.axvline(start - 0.5, color=LIGHT.ink, lw=0.8, ls=(0, (3, 2)))
        if number == 0:
            axes.set_xticks(list(labels), list(labels.values()), rotation=90, size=_LABEL, parse_math=False)
            axes.tick_params(axis="x", length=0)
    _scale(page, image, page.axes(left + width + 0.15, foot, 0.14, min(tall, 3.0)))
    return page.png()


def _colours(values: np.ndarray) -> dict[str, Any]:
    """Return a logarithmic colour scale from the 1st to the 99th percentile."""
    from matplotlib.colors import LogNorm

    low, high = np.quantile(values, [0.01, 0.99])
    # A range of at least a factor of 5 has two labels, also if all values are equal.
    low = max(low, _SMALLEST)
    norm = LogNorm(low, max(high, 5 * low))
    return {"norm": norm, "cmap": _SCALE}


def _labels(tokens: tuple[Token, ...], every: int) -> dict[int, str]:
    """Return place -> label of every ``every``-th token; the label is the id if the font lacks a character."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_FONT))
    labels = {}
    for place in range(0, len(tokens), every):
        words = look.label(tokens[place])
        labels[place] = words if all(font.get_char_index(ord(c)) for c in words) else f"#{tokens[place].id}"
    return labels


def _scale(page: Page, image: Any, axes: Any) -> None:
    """Draw the colour bar of an image."""
    bar = page.figure.colorbar(image, cax=axes, extend="both")
    bar.outline.set_visible(False)
    _name_decades(axes.yaxis, _percent)


def _medians(profile: Profile, title: str) -> bytes:
    """Draw medians per layer with a band for each definition, and block influence beside them."""
    page = Page(13.2, 4.5)
    facts = f"{_tokens(profile)}; medians, and bands from the 10th to the 90th percentile"
    page.head(_EDGE, f"Contribution by depth: {title}", facts)
    lowest, highest = math.inf, 0.0
    panels = []
    for number, (label, pick) in enumerate(_definitions()):
        axes = page.axes(0.9 + 4.15 * number, 0.6, 3.5, 2.9)
        _lines(axes, profile, pick)
        axes.set_title(label, loc="left", size=9, weight="bold", pad=4)
        axes.set_yscale("log")
        _name_decades(axes.yaxis, _percent)
        lowest, highest = min(lowest, axes.get_ylim()[0]), max(highest, axes.get_ylim()[1])
        panels.append(axes)
    for axes in panels:
        axes.set_ylim(lowest, highest)
    panels[0].legend(loc="upper right", fontsize=_SMALL)
    panels.append(page.axes(0.9 + 4.15 * 2, 0.6, 3.5, 2.9))
    _influences(panels[-1], profile)
    for axes in panels:
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(axis="y", lw=0.5)
    return page.png()


def _lines(axes: Any, profile: Profile, pick: Callable[[Contribution], Any]) -> None:
    """Draw a line with a band per residual block, and the median of whole layers if these have several blocks."""
    depth = range(len(profile.layers))
    for name, colour, marker in zip(profile.blocks, SERIES, _MARKERS, strict=False):
        spreads = [pick(layer.blocks[name]) for layer in profile.layers]
        axes.fill_between(depth, [s.p10 for s in spreads], [s.p90 for s in spreads], color=colour, alpha=0.16, lw=0)
        axes.plot(depth, [s.median for s in spreads], color=colour, lw=1.6, marker=marker, ms=3, label=_spoken(name))
    if len(profile.blocks) > 1:
        whole = [pick(layer.whole).median for layer in profile.layers]
        axes.plot(depth, whole, color=SERIES[2], lw=1, ls=(0, (4, 3)), label="whole layer")


def _influences(axes: Any, profile: Profile) -> None:
    """Draw the block influence of whole layers; the axis is logarithmic if all values are positive."""
    influence = [layer.influence for layer in profile.layers]
    axes.plot(range(len(influence)), influence, color=SERIES[2], lw=1.2, marker="o", ms=3)
    axes.set_title(f"block influence, mean of {INFLUENCE}", loc="left", size=9, weight="bold", pad=4)
    if min(influence) > 0:
        axes.set_yscale("log")
        _name_decades(axes.yaxis, lambda value, _: f"{value:.4g}")


def _sparsity(profile: Profile, measured: Measured, title: str) -> bytes:
    """Draw the share of pairs (token, residual block) below each threshold."""
    page = Page(6.9, 4.5)
    page.head(_EDGE, f"Sparsity against threshold: {title}", f"{_tokens(profile)}; pairs of token and block")
    axes = page.axes(0.9, 0.6, 5.6, 2.95)
    pairs = all_blocks(measured.blocks)
    for values, (label, pick), colour, marker, dashes in zip(
        (pairs.of_input, pairs.of_output), _definitions(), SERIES[:2], _MARKERS, _DASHES, strict=True
    ):
        grid = np.quantile(values, np.linspace(0, 1, 1001)).clip(min=_SMALLEST)
        axes.plot(grid, np.linspace(0, 1, 1001), color=colour, lw=1.8, ls=dashes, label=label)
        median = pick(profile.all_blocks).median
        axes.plot([max(median, _SMALLEST)], [0.5], marker, color=colour, ms=5, label=f"median {_percent(median)}")
    lowest, highest = np.quantile(np.stack([pairs.of_input, pairs.of_output]), [0.005, 0.995])
    lowest = max(lowest, _SMALLEST)
    axes.set(xscale="log", xlim=(lowest, max(highest, 2 * lowest)), ylim=(0, 1))
    axes.set(xlabel="threshold", ylabel="share below it")
    _name_decades(axes.xaxis, _percent)
    axes.yaxis.set_major_formatter(_percent)
    axes.grid(lw=0.5)
    axes.legend(loc="upper left")
    return page.png()


def _definitions() -> tuple[tuple[str, Callable[[Contribution], Any]], ...]:
    return (OF_INPUT, lambda c: c.of_input), (OF_OUTPUT, lambda c: c.of_output)


def _tokens(profile: Profile) -> str:
    return f"{profile.tokens:,} tokens in windows of {profile.window}"
