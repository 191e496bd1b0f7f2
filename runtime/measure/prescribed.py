"""Decisions that a benchmark prescribes instead of leaving them to routers, so that what is skipped is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dynexport.runtime.bundle.checks import is_integer, is_number, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting

Array = np.ndarray
# For a number of rows and of tokens: per row the decisions of every token, as ``prefill`` takes them; None leaves them.
Routes = Callable[[int, int], list[Array] | None]


def as_routers_decide(rows: int, tokens: int) -> None:
    """Prescribe nothing."""


def every_layer(manifest: Manifest) -> Routes:
    """Prescribe full depth: every routed layer runs every token, or a path takes every layer of the pool in order.

    Raises:
        DynexportError: as ``in_order``.
    """
    if isinstance(manifest.routing, PathRouting):
        return in_order(manifest)
    return as_routers_decide if manifest.routing is None else skipping(manifest, 0.0)


def skipping(manifest: Manifest, rate: float) -> Routes:
    """Prescribe that every token skips equally many routed layers, or one more where the rate lies between.

    Which ones they are differs from token to token and from row to row.

    Returns:
        Decisions bool [R, tokens].

    Raises:
        DynexportError: for a bundle without routed layers, or a rate that is no share.
    """
    if not isinstance(manifest.routing, LayerRouting):
        raise DynexportError(
            f"skip rates: expected a bundle with routers in its layers, found {manifest.contract.strategy}"
        )
    if not is_number(rate) or not 0 <= rate <= 1:
        raise DynexportError(f"skip rates: expected shares from 0 to 1, found {shown(rate)}")
    layers = len(manifest.routing.layers)

    def routes(rows: int, tokens: int) -> list[Array]:
        generator = np.random.default_rng(1)
        ranks = generator.permuted(np.tile(np.arange(layers), (rows, tokens, 1)), axis=2)
        skipped = np.floor(rate * layers + generator.random((rows, tokens)))
        return list((ranks >= skipped[:, :, None]).transpose(0, 2, 1))

    return routes


def walking(manifest: Manifest, hops: int) -> Routes:
    """Prescribe that every token takes a path of so many layers, none twice while there are others, and leaves.

    Which ones they are differs from token to token and from row to row.

    Returns:
        Decisions int64 [R, tokens].

    Raises:
        DynexportError: for a bundle without paths, or a length that none of its paths has.
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
    """Prescribe that every token runs every layer of the pool once, in order: the sequential model.

    Raises:
        DynexportError: for a bundle without paths, or where no path is that long, or all are longer.
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
        raise DynexportError(f"hops: expected {least}..{most}, as the bundle's paths have, found {shown(hops)}")


def _left(routing: PathRouting, layers: int, path: Array) -> Array:
    """Paths int64 [.., taken] as [.., hops]: after the last layer the token leaves."""
    rest = routing.hops - path.shape[-1]
    return np.pad(path, [(0, 0)] * (path.ndim - 1) + [(0, rest)], constant_values=layers)


__all__ = ["Routes", "as_routers_decide", "every_layer", "in_order", "skipping", "walking"]
