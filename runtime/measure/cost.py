"""The floor: bytes that a decode step must read, FLOPs that a prompt must spend, and what skipping can give at best."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_list
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import Manifest

Array = np.ndarray


def realised_bytes(manifest: Manifest, ran: Array, entries: Array) -> int:
    """Bytes that one decode step reads: the head, every layer that any row ran, and those rows' caches.

    Args:
        ran: bool [layers, rows], who ran where.
        entries: int64 [layers, rows], entries that are attended to there.
    """
    cost = manifest.cost
    weights = cost.shared + sum(cost.layers[layer] for layer in np.flatnonzero(ran.any(axis=1)))
    return weights + int(entries[ran].sum()) * cost.kv_per_token


def step_bytes(manifest: Manifest, keep: Collection[int], context: int, rows: int = 1) -> int:
    """Bytes that one decode step reads where all rows run the same layers.

    Args:
        keep: layers that run.
        context: cached tokens of each row.
        rows: batch size.

    Raises:
        DynexportError: for a layer that the model does not have.
    """
    layers = checked_list("keep", keep, "layers")
    for layer in layers:
        checked_count("keep: a layer", layer, 0, manifest.model.layers - 1)
    ran = np.zeros((manifest.model.layers, rows), bool)
    ran[layers] = True
    return realised_bytes(manifest, ran, np.full(ran.shape, context))


def ideal_speedup(manifest: Manifest, keep: Collection[int], context: int = 0, rows: int = 1) -> float:
    """How many times faster than full depth a step can be, if reading memory is what it costs."""
    everything = range(manifest.model.layers)
    return step_bytes(manifest, everything, context, rows) / step_bytes(manifest, keep, context, rows)


def path_bytes(manifest: Manifest, path: Array, entries: Array) -> int:
    """Bytes that one decode step of a Radial Network reads.

    In every step of the path: the router, every layer that any row chose, and those rows' caches; then the head. A
    layer that is chosen again is read again.

    Args:
        path: int64 [max_steps, rows]: a layer, the number of layers for leaving, -1 after that.
        entries: int64 [max_steps, rows], entries that are attended to there.
    """
    cost, layers = manifest.cost, manifest.model.layers
    ran = (path >= 0) & (path < layers)
    weights = cost.shared + int((path >= 0).any(axis=1).sum()) * 4 * _router_weights(manifest)
    weights += sum(cost.layers[int(layer)] for step, row in zip(path, ran, strict=True) for layer in set(step[row]))
    return weights + int(entries[ran].sum()) * cost.kv_per_token


def attended(manifest: Manifest, paths: Array, entries: Array) -> Array:
    """Entries that the last of T tokens attends to in every step of its path, its own among them.

    Args:
        paths: int64 [max_steps, T, rows].
        entries: int64 [places, rows], in every cache before those tokens; places are steps or layers, as the contract's
            ``cache_policy`` says.

    Returns:
        int64 [max_steps, rows]; 0 where it ran in no layer.
    """
    layers, last = manifest.model.layers, paths[:, -1]
    ran = (paths >= 0) & (paths < layers)
    assert isinstance(manifest.contract, Radial)
    if manifest.contract.cache_policy == "step":
        return np.where(ran[:, -1], entries + ran.sum(axis=1), 0)
    found = np.zeros(last.shape, np.int64)
    for step, row in np.argwhere(ran[:, -1]):
        layer = last[step, row]
        mine = paths[:, :, row] == layer
        found[step, row] = entries[layer, row] + mine[:, :-1].sum() + mine[: step + 1, -1].sum()
    return found


def _router_weights(manifest: Manifest) -> int:
    """Weights of one router, float32 at any precision: norm, fc1 and fc2, biases left out."""
    assert isinstance(manifest.contract, Radial)
    hidden, inner = manifest.model.hidden_size, manifest.contract.router.hidden
    return hidden + inner * (hidden + manifest.contract.choices(manifest.model.layers))


def path_flops(manifest: Manifest, tokens: Array, choices: int) -> int:
    """FLOPs of a Radial Network's prompt on empty caches: ``prompt_flops`` and the routers.

    Args:
        tokens: int64 [places, rows], how many entries every cache has after it.
        choices: that routers made.
    """
    return prompt_flops(manifest, tokens) + 2 * choices * _router_weights(manifest)


def prompt_flops(manifest: Manifest, tokens: Array) -> int:
    """FLOPs of a prompt on empty caches, a multiplication and an addition counted as two.

    Products of the layers, attention of every token to itself and the ones before it in that layer, and the head for
    one token of every row.

    Args:
        tokens: int64 [layers, rows], how many tokens ran where.
    """
    model = manifest.model
    pairs = int((tokens * (tokens + 1) // 2).sum())
    attention = 4 * model.heads * model.head_dim * pairs
    head: int = 2 * model.hidden_size * model.vocab_size * tokens.shape[1]
    return int(tokens.sum()) * manifest.cost.layer_flops + attention + head
