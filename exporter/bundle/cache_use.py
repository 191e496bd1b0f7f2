"""Measure how well the scales of int8 KV caches suit a text (docs/serving.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from dynexport.exporter.bundle.cache_scales import LARGEST, filled
from dynexport.exporter.strategies.calibration import CalibrationOptions
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.compared import rows_together, text_windows

Array = np.ndarray


class CacheUse(BaseModel):
    """The use of int8 by the entries of one cache on a text.

    Attributes:
        place: the cache's number.
        entries: number of entries in use, of all rows.
        keys_at_end: share of the keys' channels that are at an end of the range, 127 or -127 and beyond.
        values_at_end: the same share of the values.
        largest_key: largest absolute integer of the keys.
        largest_value: largest absolute integer of the values.
    """

    place: int
    entries: int
    keys_at_end: float
    values_at_end: float
    largest_key: int
    largest_value: int


def measure_cache_use(bundle: Bundle, ids: Sequence[int], options: CalibrationOptions) -> list[CacheUse]:
    """Return the use of every cache of a bundle with int8 caches, at full depth.

    Args:
        bundle: the bundle.
        ids: the text's token ids.
        options: windows, tokens, batch and threads; there is no target rate.

    Raises:
        DynexportError: for a text that is shorter than a window or has unknown tokens, or an option out of range.
    """
    manifest = bundle.manifest
    windows = text_windows(ids, options.window, options.max_tokens, manifest.model.vocab_size)
    executor, rows = Executor(bundle, options.threads), rows_together(bundle, options.batch)
    counts = np.zeros((len(manifest.caches), 5), np.int64)  # as the attributes: entries, two at the end, two largest
    stored = [cache.place for cache in sorted(manifest.caches, key=lambda cache: cache.place) if cache.parts]
    for start in range(0, len(windows), rows):
        cache = filled(executor, windows[start : start + rows], manifest.full)
        for place in stored:
            for row, count in enumerate(cache.lengths[place].tolist()):
                key, value = (
                    np.abs(cache.buffers[f"{place}.{part}"][row, :, :count].astype(np.int16))
                    for part in ("key", "value")
                )
                counts[place, :3] += (count, (key >= LARGEST).sum(), (value >= LARGEST).sum())
                counts[place, 3:] = np.maximum(counts[place, 3:], [part.max(initial=0) for part in (key, value)])
    sizes = [manifest.model.kv_heads_in(place) * manifest.model.head_dim for place in range(len(counts))]
    return [
        CacheUse(
            place=place,
            entries=entries,
            keys_at_end=keys / max(1, entries * sizes[place]),
            values_at_end=values / max(1, entries * sizes[place]),
            largest_key=key,
            largest_value=value,
        )
        for place, (entries, keys, values, key, value) in enumerate(counts.tolist())
        if place in stored
    ]


__all__ = ["CacheUse", "measure_cache_use"]
