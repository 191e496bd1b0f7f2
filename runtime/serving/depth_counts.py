"""Counts of the layers that tokens ran in and of routers' margins, and the same counts of a bundle's golden vectors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from safetensors import safe_open

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import told_as
from dynexport.runtime.bundle.manifest import DEQUANTISED, GOLDEN, LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.decisions import DecisionReader, Decisions

Array = np.ndarray
Phase: TypeAlias = Literal["prompt", "decode"]
PHASES: tuple[Phase, ...] = ("prompt", "decode")
# Upper bounds of margins. A routed layer's margin is a difference of probabilities, counted as negative for a token
# that skips the layer; a path's is a difference of scores.
_LAYER_MARGINS = (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_PATH_MARGINS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_MOST_DEPTHS = 16  # buckets of a histogram of depths
_HALF_LIFE = 10_000  # tokens after which a margin counts half as much in the drift


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of the counts; arrays as in ``DepthCounts``."""

    depths: Array
    summed: Array
    runs: Array
    margins: Array
    overflow: int


@dataclass
class DepthCounts:
    """Counts of one model's tokens. One thread adds, any thread reads.

    Args:
        manifest: the bundle's manifest.

    Attributes:
        layers: the layers that routers decide about, ascending; none without routers.
        routers: numbers of the routers: of the routed layer, or of the hop of a path.
        depth_bounds: upper bounds of the histogram of layers per token.
        margin_bounds: upper bounds of the histogram of margins.
    """

    manifest: Manifest
    layers: tuple[int, ...] = ()
    routers: tuple[str, ...] = ()
    depth_bounds: Array = field(init=False)
    margin_bounds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        routing, most = self.manifest.routing, self.manifest.model.layers
        if isinstance(routing, LayerRouting):
            self.layers, self.routers, self.margin_bounds = routing.layers, routing.names, _LAYER_MARGINS
        elif isinstance(routing, PathRouting):
            self.layers, self.routers = tuple(range(most)), tuple(map(str, range(routing.hops)))
            self.margin_bounds, most = _PATH_MARGINS, routing.hops
        self.depth_bounds = np.unique(np.linspace(0, most, min(most, _MOST_DEPTHS) + 1).astype(np.int64))
        self._reader, self._lock = DecisionReader(self.manifest), threading.Lock()
        self._depths = np.zeros((len(PHASES), len(self.depth_bounds) + 1), np.int64)
        self._summed = np.zeros(len(PHASES), np.int64)
        self._runs = np.zeros(len(self.layers), np.int64)
        self._margins = np.zeros((len(self.routers), len(self.margin_bounds) + 1), np.int64)
        self._latest = np.zeros(self._margins.shape)
        self._overflow = 0

    def add(self, phase: Phase, calls: Sequence[Decisions]) -> None:
        """Count the tokens of one row from the decisions of consecutive calls."""
        decisions = self._reader.joined(calls)
        depths = self._reader.layers_run(decisions)
        runs = decisions.ran[list(self.layers)].sum(axis=1)
        margins = self._binned(decisions)
        faded = 0.5 ** (len(depths) / _HALF_LIFE)
        with self._lock:
            self._add_depths(phase, np.bincount(depths, minlength=1))
            self._runs += runs
            self._margins += margins
            self._latest = self._latest * faded + margins
            self._overflow += int(decisions.overflow.sum())

    def add_unrouted(self, phase: Phase, tokens: int, layers: int) -> None:
        """Count tokens that ran in the same number of layers, without routers."""
        if tokens:
            with self._lock:
                self._add_depths(phase, np.bincount([layers], [tokens]).astype(np.int64))

    def read(self) -> Snapshot:
        """Return the counts.

        Returns:
            ``depths`` int64 [phases, bounds + 1], tokens of each bucket; ``summed`` int64 [phases], the sum of their
            layers; ``runs`` int64 [layers], tokens that ran in each; ``margins`` int64 [routers, bounds + 1], decisions
            of each bucket; ``overflow``, the number of tokens that found a layer or its cache full.
        """
        with self._lock:
            return Snapshot(
                self._depths.copy(), self._summed.copy(), self._runs.copy(), self._margins.copy(), self._overflow
            )

    def drift(self, expected: Snapshot) -> Array:
        """Return the distance of the latest margins' distribution from that of other counts, float64 [routers].

        It is the Kolmogorov-Smirnov distance at the histogram's bounds, from 0 to 1; NaN without margins. The latest
        margins weigh most: after 10,000 further tokens a margin counts half as much.
        """
        with self._lock:
            latest = self._latest.copy()
        found, wanted = (_distribution(margins) for margins in (latest, expected.margins))
        return np.asarray(np.abs(found - wanted).max(axis=1))

    def _add_depths(self, phase: Phase, tokens: Array) -> None:
        """Count tokens by their number of layers, int64 [layers + 1]."""
        place, depths = PHASES.index(phase), np.arange(len(tokens))
        np.add.at(self._depths[place], np.searchsorted(self.depth_bounds, depths), tokens)
        self._summed[place] += int(tokens @ depths)

    def _binned(self, decisions: Decisions) -> Array:
        """Return the number of decisions in each bucket, int64 [routers, bounds + 1]; without alternatives none."""
        margins = decisions.margins
        if isinstance(self.manifest.routing, LayerRouting):
            margins = np.where(decisions.choices == 1, margins, -margins)
        width = len(self.margin_bounds) + 1
        bins = np.searchsorted(self.margin_bounds, margins) + width * np.arange(len(margins))[:, None]
        counted = np.bincount(bins[np.isfinite(margins)], minlength=width * len(margins))
        return np.asarray(counted.reshape(len(margins), width))


def _distribution(margins: Array) -> Array:
    """Return the cumulative distribution of each router's margins; NaN for one without any."""
    totals = margins.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(np.cumsum(margins, axis=1) / np.where(totals, totals, np.nan))


def golden_counts(bundle: Bundle) -> DepthCounts | None:
    """Return the counts of the longest row of a bundle's golden vectors, which PyTorch computed.

    Of a quantised bundle, it is a row with the bundle's own weights. Its tokens count as a prompt.

    Returns:
        The counts, or None without routers or golden vectors.

    Raises:
        DynexportError: when the golden vectors cannot be read.
    """
    path, counts = bundle.file(GOLDEN), DepthCounts(bundle.manifest)
    if path is None or not counts.routers:
        return None
    with told_as(f"{path}: expected golden vectors"), safe_open(path, framework="numpy") as file:
        names = [name.removesuffix(".margin") for name in file.keys() if name.endswith(".margin")]  # noqa: SIM118
        rounded = [name for name in names if name.startswith(DEQUANTISED)]
        if not names:
            return None
        longest = max(rounded or names, key=lambda name: int(file.get_slice(f"{name}.margin").get_shape()[1]))
        parts = {part: file.get_tensor(f"{longest}.{part}") for part in ("score", "margin")}
        chosen = "chosen" if isinstance(bundle.manifest.routing, LayerRouting) else "path"
        choices = file.get_tensor(f"{longest}.{chosen}").astype(np.int64)
        active = np.ones(bundle.manifest.model.layers, bool)
        nothing = np.zeros(0, np.int64)
        reader = DecisionReader(bundle.manifest)
        counts.add("prompt", [reader.of_row(choices, parts["score"], parts["margin"], nothing, active)])
    return counts


__all__ = ["PHASES", "DepthCounts", "Phase", "Snapshot", "golden_counts"]
