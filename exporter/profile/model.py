"""The data of a profile: percentiles per layer and overall, sparsity by threshold, and the layers to skip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.exporter.profile.measurement import Array, Measured, Ratios
from dynexport.runtime.bundle.checks import is_integer, is_number, shown
from dynexport.runtime.bundle.errors import DynexportError

# Thresholds of contributions, ten per decade.
THRESHOLDS = tuple(float(f"{10 ** (step / 10):.4g}") for step in range(-40, 11))


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Part):
    """Percentiles of a contribution over tokens, with linear interpolation."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: Array) -> Spread:
        """Return the percentiles of at least one value."""
        p10, median, p90 = np.quantile(values, [0.1, 0.5, 0.9])
        return cls(p10=float(p10), median=float(median), p90=float(p90))


class Contribution(_Part):
    """Percentiles of the relative size of a contribution R(x), by both definitions.

    Attributes:
        of_input: ||R(x)|| / ||x||.
        of_output: ||R(x)|| / ||x + R(x)||.
    """

    of_input: Spread
    of_output: Spread


class Layer(_Part):
    """The figures of one decoder layer.

    Attributes:
        layer: the layer's number.
        blocks: name of a residual block -> its contribution.
        whole: the contribution of the whole layer.
        influence: 1 - cos(x, x + R(x)), the mean over tokens.
        skip_order: rank by influence; 0 for the least, which a budget skips first.
    """

    layer: int
    blocks: dict[str, Contribution]
    whole: Contribution
    influence: float
    skip_order: int


class Sparsity(_Part):
    """Shares of pairs (token, residual block) whose contribution is below a threshold.

    Attributes:
        thresholds: T thresholds, ascending.
        of_input: T shares of pairs with ||R(x)|| / ||x|| below the threshold.
        of_output: T shares of pairs with ||R(x)|| / ||x + R(x)|| below the threshold.
    """

    thresholds: tuple[float, ...]
    of_input: tuple[float, ...]
    of_output: tuple[float, ...]


class Profile(_Part):
    """The profile of one checkpoint on one text.

    Attributes:
        tokens: number of measured tokens.
        window: number of tokens per window.
        layers: the figures of each layer.
        blocks: name of a residual block -> its contribution over all layers and tokens.
        all_blocks: contribution over all layers, tokens and blocks; its median is the figure in the paper.
        all_layers: contribution of whole layers, over all layers and tokens.
        sparsity: shares of small contributions by threshold.
    """

    tokens: int
    window: int
    layers: tuple[Layer, ...]
    blocks: dict[str, Contribution]
    all_blocks: Contribution
    all_layers: Contribution
    sparsity: Sparsity

    def least(self, count: int) -> tuple[int, ...]:
        """Return the ``count`` layers with the least block influence, in ascending order."""
        return tuple(layer.layer for layer in self.layers if layer.skip_order < count)


def layers_to_skip(layers: int, *, skip: int | None = None, budget: float | None = None) -> int:
    """Return the number of layers to skip, from ``skip`` or ``budget``.

    Args:
        layers: number of layers of the model.
        skip: number of layers to skip; takes precedence over ``budget``.
        budget: share of layers that stay, over 0 and up to 1, rounded down to whole layers.

    Raises:
        DynexportError: if ``skip`` or ``budget`` is out of range, or no layer would stay.
    """
    if skip is not None:
        if not is_integer(skip) or not 0 <= skip < layers:
            raise DynexportError(f"skip: expected 0..{layers - 1} of {layers} layers, found {shown(skip)}")
        return skip
    if budget is None or not is_number(budget) or not 0 < budget <= 1:
        raise DynexportError(f"budget: expected a share of the layers, over 0 and up to 1, found {shown(budget)}")
    # A product such as 0.29 * 100 comes out a little below the whole number that is meant.
    kept = math.floor(budget * layers + 1e-9)
    if kept == 0:
        raise DynexportError(f"budget: expected at least 1 of {layers} layers to stay, found {budget:g} of them")
    return layers - kept


def summarise(measured: Measured) -> Profile:
    """Return the profile of a measurement."""
    influence = measured.influence.mean(axis=1)
    order = np.empty(len(influence), np.int64)
    order[np.argsort(influence, kind="stable")] = np.arange(len(influence))  # ties in layer order
    layers = tuple(
        Layer(
            layer=i,
            blocks={name: _contribution(ratios, i) for name, ratios in measured.blocks.items()},
            whole=_contribution(measured.layer, i),
            influence=float(influence[i]),
            skip_order=int(order[i]),
        )
        for i in range(len(influence))
    )
    pairs = all_blocks(measured.blocks)
    return Profile(
        tokens=len(measured.tokens),
        window=measured.window,
        layers=layers,
        blocks={name: _contribution(ratios) for name, ratios in measured.blocks.items()},
        all_blocks=_contribution(pairs),
        all_layers=_contribution(measured.layer),
        sparsity=Sparsity(
            thresholds=THRESHOLDS, of_input=_shares_below(pairs.of_input), of_output=_shares_below(pairs.of_output)
        ),
    )


def all_blocks(blocks: Mapping[str, Ratios]) -> Ratios:
    """Return the ratios of all residual blocks together, [layers * blocks, tokens] each."""
    parts = blocks.values()
    return Ratios(np.concatenate([r.of_input for r in parts]), np.concatenate([r.of_output for r in parts]))


def _contribution(ratios: Ratios, layer: Any = slice(None)) -> Contribution:
    return Contribution(of_input=Spread.of(ratios.of_input[layer]), of_output=Spread.of(ratios.of_output[layer]))


def _shares_below(values: Array) -> tuple[float, ...]:
    """Return the share of values below each threshold."""
    counts = np.searchsorted(np.sort(values, axis=None), THRESHOLDS, side="left")
    return tuple((counts / values.size).tolist())
