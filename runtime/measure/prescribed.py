"""Routes that a benchmark prescribes instead of leaving them to routers, so that what is skipped is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dynexport.runtime.bundle.checks import is_integer, is_number, shown
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest

Array = np.ndarray
# For a number of rows and of tokens: per row the decisions of every token, as ``prefill`` takes them; None leaves them.
Routes = Callable[[int, int], list[Array] | None]


def as_routers_decide(rows: int, tokens: int) -> None:
    """Nothing is prescribed."""


def skipping(manifest: Manifest, rate: float) -> Routes:
    """Tokens skip equally many routed layers, or one more where the rate lies between.

    Which ones they are differs from token to token and from row to row.

    Returns:
        Routes bool [R, tokens].

    Raises:
        DynexportError: for a bundle without routed layers, or a rate that is no share.
    """
    if manifest.routed is None:
        raise DynexportError(f"skip rates: expected a bundle of Mixture-of-Depths, found {manifest.contract.strategy}")
    if not is_number(rate) or not 0 <= rate <= 1:
        raise DynexportError(f"skip rates: expected shares from 0 to 1, found {shown(rate)}")
    layers = len(manifest.routed.layers)

    def routes(rows: int, tokens: int) -> list[Array]:
        generator = np.random.default_rng(1)
        ranks = generator.permuted(np.tile(np.arange(layers), (rows, tokens, 1)), axis=2)
        skipped = np.floor(rate * layers + generator.random((rows, tokens)))
        return list((ranks >= skipped[:, :, None]).transpose(0, 2, 1))

    return routes


def walking(manifest: Manifest, depth: int) -> Routes:
    """Every token takes a path of ``depth`` layers, none twice while there are others, and leaves.

    Which ones they are differs from token to token and from row to row.

    Returns:
        Routes int64 [max_steps, tokens].

    Raises:
        DynexportError: for a bundle without paths, or a depth that its contract has no path of.
    """
    contract, layers = _paths_of(manifest), manifest.model.layers
    _check_depth(contract, layers, depth)

    def routes(rows: int, tokens: int) -> list[Array]:
        generator = np.random.default_rng(1)
        rounds = [
            generator.permuted(np.tile(np.arange(layers), (rows, tokens, 1)), axis=2)
            for _ in range(-(-depth // layers))
        ]
        return list(_left(contract, layers, np.concatenate(rounds, axis=2)[:, :, :depth]).transpose(0, 2, 1))

    return routes


def in_order(manifest: Manifest) -> Routes:
    """Every token runs every layer of the pool once, in order: the sequential model.

    Raises:
        DynexportError: for a bundle without paths, or where no path is that long, or all are longer.
    """
    contract, layers = _paths_of(manifest), manifest.model.layers
    try:
        _check_depth(contract, layers, layers)
    except DynexportError as error:
        raise DynexportError(f"{error}; give a dense bundle of the same model with --baseline") from error

    def routes(rows: int, tokens: int) -> list[Array]:
        path = _left(contract, layers, np.arange(layers)[None, None])[0, 0]
        return [np.tile(path[:, None], tokens)] * rows

    return routes


def _paths_of(manifest: Manifest) -> Radial:
    if not isinstance(manifest.contract, Radial):
        raise DynexportError(f"depths: expected a bundle of a Radial Network, found {manifest.contract.strategy}")
    return manifest.contract


def _check_depth(contract: Radial, layers: int, depth: int) -> None:
    most = contract.max_steps if contract.allow_reuse else min(contract.max_steps, layers)
    least = max(1, contract.min_steps) if contract.exit else most
    if not is_integer(depth) or not least <= depth <= most:
        raise DynexportError(
            f"depth: expected {least}..{most} layers, as the contract's paths have, found {shown(depth)}"
        )


def _left(contract: Radial, layers: int, path: Array) -> Array:
    """Paths int64 [.., depth] as [.., max_steps]: after the last layer the token leaves."""
    rest = contract.max_steps - path.shape[-1]
    return np.pad(path, [(0, 0)] * (path.ndim - 1) + [(0, rest)], constant_values=layers)


__all__ = ["Routes", "as_routers_decide", "in_order", "skipping", "walking"]
