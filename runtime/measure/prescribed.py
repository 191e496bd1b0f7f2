"""Routing decisions that a benchmark prescribes, so that the share of skipped layers is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dynexport.runtime.bundle.checks import is_integer, is_number, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting

Array = np.ndarray
# (rows, tokens) -> per row the decisions of every token, as ``prefill`` takes them; None: routers decide.
Routes = Callable[[int, int], list[Array] | None]


def as_routers_decide(rows: int, tokens: int) -> None:
    """Return None: no decision is prescribed."""


def every_layer(manifest: Manifest) -> Routes:
    """Return decisions for full depth: every routed layer runs, or a path takes each layer of the pool in order.

    Raises:
        DynexportError: for the reasons of ``in_order``.
    """
    if isinstance(manifest.routing, PathRouting):
        return in_order(manifest)
    return as_routers_decide if manifest.routing is None else skipping(manifest, 0.0)


def skipping(manifest: Manifest, rate: float) -> Routes:
    """Return decisions by which every token skips a share of the R routed layers, or of their parts.

    The number of skipped layers is rate * R; where that is no whole number, it is rounded at random up or down, so that
    the mean is right. The skipped layers differ from token to token and from row to row.

    Returns:
        A function that gives, per row, decisions bool [R, tokens], True where the layer runs.

    Raises:
        DynexportError: the bundle has no routed layers, or ``rate`` is not in 0..1.
    """
    if not isinstance(manifest.routing, LayerRouting):
        raise DynexportError(
            f"skip rates: expected a bundle with routers in its layers, found {manifest.contract.strategy}"
        )
    if not is_number(rate) or not 0 <= rate <= 1:
        raise DynexportError(f"skip rates: expected shares from 0 to 1, found {shown(rate)}")
    layers = manifest.routing.decisions

    def routes(rows: int, tokens: int) -> list[Array]:
        generator = np.random.default_rng(1)
        ranks = generator.permuted(np.tile(np.arange(layers), (rows, tokens, 1)), axis=2)
        skipped = np.floor(rate * layers + generator.random((rows, tokens)))
        return list((ranks >= skipped[:, :, None]).transpose(0, 2, 1))

    return routes


def walking(manifest: Manifest, hops: int) -> Routes:
    """Return decisions by which every token takes a path of ``hops`` layers and then exits.

    A layer is repeated only after every layer of the pool has run. The layers differ from token to token and from row
    to row.

    Returns:
        A function that gives, per row, decisions int64 [R, tokens], the layer of every hop.

    Raises:
        DynexportError: the bundle has no paths, or its paths cannot have this length.
    """
    routing, layers = _paths_of(manifest), manifest.model.layers
    _check_hops(routing, layers, hops)

    def routes(rows: int, tokens: int) -> list[Array]:
        generator = np.random.default_rng(1)
        rounds = [
            generator.permuted(np.tile(np.arange(layers), (rows, tokens, 1)), axis=2) for _ in range(-(-hops // layers))
        ]
        return list(_left(routing, layers, np.concatenate(rounds, axis=2)[:, :, :hops]).transpose(0, 2, 1))

    return routes


def in_order(manifest: Manifest) -> Routes:
    """Return decisions by which every token runs each layer of the pool once, in order.

    Raises:
        DynexportError: the bundle has no paths, or its paths cannot have this length.
    """
    routing, layers = _paths_of(manifest), manifest.model.layers
    try:
        _check_hops(routing, layers, layers)
    except DynexportError as error:
        raise DynexportError(f"{error}; name a bundle of the same model without routers with --baseline") from error

    def routes(rows: int, tokens: int) -> list[Array]:
        path = _left(routing, layers, np.arange(layers)[None, None])[0, 0]
        return [np.tile(path[:, None], tokens)] * rows

    return routes


def _paths_of(manifest: Manifest) -> PathRouting:
    if not isinstance(manifest.routing, PathRouting):
        raise DynexportError(
            f"hops: expected a bundle whose tokens take paths through a pool of layers, found "
            f"{manifest.contract.strategy}"
        )
    return manifest.routing


def _check_hops(routing: PathRouting, layers: int, hops: int) -> None:
    most = routing.hops if routing.reuse else min(routing.hops, layers)
    least = max(1, routing.min_hops) if routing.exit else most
    if not is_integer(hops) or not least <= hops <= most:
        raise DynexportError(f"hops: expected {least}..{most} for this bundle's paths, found {shown(hops)}")


def _left(routing: PathRouting, layers: int, path: Array) -> Array:
    """Extend paths int64 [.., taken] to [.., hops] with exits."""
    rest = routing.hops - path.shape[-1]
    return np.pad(path, [(0, 0)] * (path.ndim - 1) + [(0, rest)], constant_values=layers)


__all__ = ["Routes", "as_routers_decide", "every_layer", "in_order", "skipping", "walking"]
