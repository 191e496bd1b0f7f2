"""The floor of a decode step: the bytes that must be read, and the speed-up that skipping can give at best."""

from __future__ import annotations

from collections.abc import Collection

from dynexport.runtime.manifest import Manifest


def step_bytes(manifest: Manifest, keep: Collection[int], context: int, rows: int = 1) -> int:
    """Bytes that one decode step reads: weights of head and kept layers once, their caches for every row.

    Args:
        keep: layers that run.
        context: cached tokens of each row.
        rows: batch size.
    """
    cost = manifest.cost
    weights = cost.shared + sum(cost.layers[i] for i in keep)
    return weights + rows * context * len(keep) * cost.kv_per_token


def ideal_speedup(manifest: Manifest, keep: Collection[int], context: int = 0, rows: int = 1) -> float:
    """How many times faster than full depth a step can be, if reading memory is what it costs."""
    everything = range(manifest.model.layers)
    return step_bytes(manifest, everything, context, rows) / step_bytes(manifest, keep, context, rows)
