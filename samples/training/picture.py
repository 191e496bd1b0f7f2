"""Draw the comparison: held-out loss against the mean number of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot

INK, SOFT, LINE = "#1f2933", "#5b6875", "#9aa5b1"


@dataclass(frozen=True)
class Point:
    """A point with its label.

    Attributes:
        label: the point's label.
        depth: mean number of layers that a token runs.
        loss: nats per token.
        color: the point's color.
        causal: true if generation can run this way; other points are hollow and smaller.
        shift: the label's offset from the point, in typographic points.
    """

    label: str
    depth: float
    loss: float
    color: str
    causal: bool
    shift: tuple[float, float]


def draw(points: Sequence[Point], layers: int, path: Path, least: float = 0) -> None:
    """Write an SVG of depths from ``least`` on; equal points give equal bytes."""
    mpl.rcParams.update({"svg.hashsalt": "dynexport", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(8.2, 4.6), layout="constrained")
    for point in points:
        fill = point.color if point.causal else "white"
        size = 64 if point.causal else 24
        axes.scatter(point.depth, point.loss, s=size, facecolor=fill, edgecolor=point.color, linewidth=1.5, zorder=3)
        axes.annotate(
            point.label,
            (point.depth, point.loss),
            xytext=point.shift,
            textcoords="offset points",
            ha="left" if point.shift[0] >= 0 else "right",
            va="center",
            color=INK,
            fontsize=10,
        )
    axes.set_xlim(least, layers + 1)
    axes.set_xticks(range(math.ceil(least), layers + 1, 2))
    axes.margins(y=0.15)
    axes.set_xlabel(f"layers run per token, of {layers}", color=SOFT)
    axes.set_ylabel("held-out loss, nats per token", color=SOFT)
    axes.grid(color="#e4e7eb", zorder=0)
    axes.tick_params(colors=SOFT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
