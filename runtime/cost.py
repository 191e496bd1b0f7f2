"""The floor: bytes that a decode step must read, FLOPs that a prompt must spend, and what skipping can give at best."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from dynexport.runtime.manifest import Manifest

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
    """
    ran = np.zeros((manifest.model.layers, rows), bool)
    ran[list(keep)] = True
    return realised_bytes(manifest, ran, np.full(ran.shape, context))


def ideal_speedup(manifest: Manifest, keep: Collection[int], context: int = 0, rows: int = 1) -> float:
    """How many times faster than full depth a step can be, if reading memory is what it costs."""
    everything = range(manifest.model.layers)
    return step_bytes(manifest, everything, context, rows) / step_bytes(manifest, keep, context, rows)


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
