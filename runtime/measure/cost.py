"""Minimal cost of a decode step or a prompt: bytes read, FLOPs, and the ideal speedup that follows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_list
from dynexport.runtime.bundle.manifest import Cost, LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.decisions import Decisions

Array = np.ndarray
# Marks the hops of a path after the token has exited.
_LEFT = -1


def read_bytes(manifest: Manifest, rows: Sequence[Decisions], entries: Array) -> list[int]:
    """Return the bytes that each of T decode steps reads: weights that any row needs, and every row's caches.

    Args:
        manifest: the bundle's manifest.
        rows: per batch row, the decisions of its T tokens, one per step.
        entries: int64 [places, rows], entries in every cache before the first step.
    """
    if isinstance(manifest.routing, PathRouting):
        paths = np.stack([row.choices for row in rows], axis=2)
        seen = [attended(manifest, manifest.routing, paths[:, :t], entries) for t in range(1, 1 + paths.shape[1])]
        return [path_bytes(manifest, paths[:, t], seen[t]) for t in range(paths.shape[1])]
    if isinstance(manifest.routing, LayerRouting) and manifest.cost.parts:
        return _bytes_of_parts(manifest, manifest.routing, np.stack([row.choices for row in rows], axis=2), entries)
    ran = np.stack([row.ran for row in rows], axis=2)
    after = entries[:, None] + ran.cumsum(axis=1)
    return [layer_bytes(manifest, ran[:, t], after[:, t]) for t in range(ran.shape[1])]


def _bytes_of_parts(manifest: Manifest, routing: LayerRouting, choices: Array, entries: Array) -> list[int]:
    """Return the bytes of T decode steps in which tokens skip parts of layers.

    Args:
        manifest: the bundle's manifest.
        routing: the manifest's routing.
        choices: int64 [R, T, rows], the decisions.
        entries: int64 [layers, rows], entries before the first step.
    """
    cost, runs = manifest.cost, choices == 1
    attends = np.ones((manifest.model.layers, *runs.shape[1:]), bool)
    if routing.parts[0] != "mlp":
        attends[list(routing.layers)] = runs[:: len(routing.parts)]
    appends = attends if routing.skipped_kv == "none" else np.ones_like(attends)
    seen = np.where(attends, entries[:, None] + appends.cumsum(axis=1), 0).sum(axis=(0, 2)) * cost.kv_per_token
    spared, instead = (
        np.array([getattr(part, name) for part in cost.parts], np.int64)[:, None] for name in ("run", "skip")
    )
    weights = np.where(runs.any(axis=2), 0, -spared) + np.where(runs.all(axis=2), 0, instead)
    return [int(total) for total in cost.shared + sum(cost.layers) + weights.sum(axis=0) + seen]


def layer_bytes(manifest: Manifest, ran: Array, entries: Array) -> int:
    """Return the bytes that one decode step reads: the head, each layer that any row ran, and those rows' caches.

    Of a mixture of experts, several rows read the experts that they choose on average if each choice is as likely as
    any other; graphs do not tell which experts ran.

    Args:
        manifest: the bundle's manifest.
        ran: bool [layers, rows], whether the row ran the layer.
        entries: int64 [layers, rows], cache entries that the row attends to in the layer.
    """
    cost = manifest.cost
    weights = cost.shared + sum(
        cost.layers[layer] + more_experts(cost, layer, int(ran[layer].sum()))
        for layer in np.flatnonzero(ran.any(axis=1)).tolist()
    )
    stored = np.array([cost.kv_in(layer) for layer in range(len(ran))])
    return weights + int((entries * ran).sum(axis=1) @ stored)


def more_experts(cost: Cost, layer: int, rows: int) -> int:
    """Return the bytes of a layer's experts that ``rows`` tokens read beyond those of one token."""
    if not cost.expert:
        return 0
    missed = (1 - cost.experts_per_token / cost.experts) ** rows
    return round(cost.expert[layer] * (cost.experts * (1 - missed) - cost.experts_per_token))


def step_bytes(manifest: Manifest, keep: Collection[int], context: int, rows: int = 1) -> int:
    """Return the bytes that one decode step reads where all rows run the same layers.

    Args:
        manifest: the bundle's manifest.
        keep: layers that run.
        context: cached tokens of each row.
        rows: batch size.

    Raises:
        DynexportError: ``keep`` names a layer that the model does not have.
    """
    layers = checked_list("keep", keep, "layers")
    for layer in layers:
        checked_count("keep: a layer", layer, 0, manifest.model.layers - 1)
    ran = np.zeros((manifest.model.layers, rows), bool)
    ran[layers] = True
    return layer_bytes(manifest, ran, np.full(ran.shape, context))


def ideal_speedup(manifest: Manifest, keep: Collection[int], context: int = 0, rows: int = 1) -> float:
    """Return the largest speedup over full depth that a step can have where memory reads set its time."""
    everything = range(manifest.model.layers)
    return step_bytes(manifest, everything, context, rows) / step_bytes(manifest, keep, context, rows)


def path_bytes(manifest: Manifest, path: Array, entries: Array) -> int:
    """Return the bytes that one decode step reads where every token takes a path through a pool of layers.

    Each hop reads the router, every layer that any row chose, and those rows' caches. The head is read once. A layer
    that is chosen again is read again.

    Args:
        manifest: the bundle's manifest.
        path: int64 [hops, rows], as ``Decisions.choices``.
        entries: int64 [hops, rows], cache entries that the row attends to in the hop.
    """
    cost = manifest.cost
    ran = (path >= 0) & (path < manifest.model.layers)
    weights = cost.shared + int((path != _LEFT).any(axis=1).sum()) * cost.router
    weights += sum(cost.layers[int(layer)] for hop, row in zip(path, ran, strict=True) for layer in set(hop[row]))
    return weights + int(entries[ran].sum()) * cost.kv_per_token


def attended(manifest: Manifest, routing: PathRouting, paths: Array, entries: Array) -> Array:
    """Return the cache entries that the last of T tokens attends to in every hop of its path, its own included.

    Args:
        manifest: the bundle's manifest.
        routing: the manifest's routing.
        paths: int64 [hops, T, rows], as ``Decisions.choices``.
        entries: int64 [places, rows], entries in every cache before the T tokens.

    Returns:
        int64 [hops, rows]; 0 where the token ran no layer.
    """
    last = paths[:, -1]
    ran = (paths >= 0) & (paths < manifest.model.layers)
    if routing.places == "hops":
        return np.where(ran[:, -1], entries + ran.sum(axis=1), 0)
    found = np.zeros(last.shape, np.int64)
    for hop, row in np.argwhere(ran[:, -1]):
        layer = last[hop, row]
        mine = paths[:, :, row] == layer
        found[hop, row] = entries[layer, row] + mine[:, :-1].sum() + mine[: hop + 1, -1].sum()
    return found


def flops_of_prompts(manifest: Manifest, rows: Sequence[Decisions]) -> int:
    """Return the FLOPs of a batch of prompts on empty caches: ``prompt_flops`` and the routers of paths.

    Args:
        manifest: the bundle's manifest.
        rows: per batch row, the decisions of its prompt's tokens.
    """
    if not isinstance(manifest.routing, PathRouting):
        return prompt_flops(manifest, np.stack([row.ran.sum(axis=1) for row in rows], axis=1))
    layers, paths = manifest.model.layers, [row.choices for row in rows]
    if manifest.routing.places == "hops":
        tokens = [((path >= 0) & (path < layers)).sum(axis=1) for path in paths]
    else:
        tokens = [(path[None] == np.arange(layers)[:, None, None]).sum(axis=(1, 2)) for path in paths]
    choices = sum(int((path != _LEFT).sum()) for path in paths)
    return prompt_flops(manifest, np.stack(tokens, axis=1)) + choices * manifest.cost.router_flops


def prompt_flops(manifest: Manifest, tokens: Array) -> int:
    """Return the FLOPs of a batch of prompts on empty caches; a multiply-add is two FLOPs.

    Counted are the layers' matrix products, causal attention per place, and the head for one token of every row.

    Args:
        manifest: the bundle's manifest.
        tokens: int64 [places, rows], number of tokens that ran in the place.
    """
    model, places = manifest.model, range(len(tokens))
    heads = np.array([model.heads_in(place) for place in places])
    products = np.array([manifest.cost.flops_in(place) for place in places])
    attention = 4 * model.head_dim * int((tokens * (tokens + 1) // 2).sum(axis=1) @ heads)
    head: int = 2 * model.hidden_size * model.vocab_size * tokens.shape[1]
    return int(tokens.sum(axis=1) @ products) + attention + head


__all__ = [
    "attended",
    "flops_of_prompts",
    "ideal_speedup",
    "layer_bytes",
    "path_bytes",
    "prompt_flops",
    "read_bytes",
    "step_bytes",
]
