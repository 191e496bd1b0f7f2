"""Give a written bundle int8 KV caches: run a text with float caches, and scale by the largest entry of a channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from dynexport.exporter.bundle.options import CALIBRATION_TOKENS
from dynexport.exporter.lowering.int8_caches import CacheScales, is_entry, make_caches_int8
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import CachePart, Depth, Manifest, TensorSpec
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.measure.compared import rows_together, text_windows

Array = np.ndarray
_Spec = TypeVar("_Spec", CachePart, TensorSpec)
# Tokens of one window, and windows that run together.
_WINDOW, _ROWS = 256, 8
# Of each window, this share runs as a prompt and the rest as decode steps, which may run in other layers.
_PROMPT = 0.75
_LARGEST = 127


def with_int8_caches(part: Path, manifest: Manifest, graphs: Sequence[ir.Model], ids: Sequence[int]) -> Manifest:
    """Write a bundle's graphs again, with int8 caches; return the manifest that describes them.

    Args:
        part: the directory of the bundle, which has its graphs and weights.
        manifest: its manifest.
        graphs: the graphs in the manifest's order; they are changed in place.
        ids: token ids of the text to measure scales on.

    Raises:
        DynexportError: as for ``measure_scales``.
    """
    scales = measure_scales(Bundle(part, manifest), ids)
    described = []
    for graph, model in zip(manifest.graphs, graphs, strict=True):
        make_caches_int8(model, scales)
        ir.save(model, part / graph.file)
        inputs, outputs = (
            tuple(_int8(spec) if is_entry(spec.name) else spec for spec in specs)
            for specs in (graph.inputs, graph.outputs)
        )
        described.append(graph.model_copy(update={"inputs": inputs, "outputs": outputs}))
    caches = [
        cache.model_copy(
            update={
                "parts": {name: _int8(part) if is_entry(part.input) else part for name, part in cache.parts.items()}
            }
        )
        for cache in manifest.caches
    ]
    cost = manifest.cost.model_copy(update={"kv_per_token": manifest.cost.kv_per_token // 4})
    return manifest.model_copy(update={"graphs": tuple(described), "caches": tuple(caches), "cost": cost})


def _int8(spec: _Spec) -> _Spec:
    return spec.model_copy(update={"dtype": "int8"})


def measure_scales(bundle: Bundle, ids: Sequence[int]) -> dict[int, CacheScales]:
    """Return the scales by place: the largest absolute entry of every channel on a text, divided by 127.

    The text's windows run at every depth. A channel whose entries are all zero, such as padding, has the scale 1.

    Args:
        bundle: a bundle with float32 caches.
        ids: the text's token ids; at most the first 4096 are used.

    Raises:
        DynexportError: for a text that is shorter than a window of 256 tokens (or of the context), has unknown tokens,
            or leaves a cache empty; for entries that are no numbers.
    """
    manifest = bundle.manifest
    windows = text_windows(ids, _window(manifest), CALIBRATION_TOKENS, manifest.model.vocab_size)
    executor, rows = Executor(bundle), rows_together(bundle, _ROWS)
    largest: dict[str, Array] = {}
    for depth in (manifest.full, *manifest.depths):
        for start in range(0, len(windows), rows):
            for name, found in _largest(_filled(executor, windows[start : start + rows], depth)).items():
                largest[name] = np.maximum(largest.get(name, found), found)
    return {cache.place: _scales(cache.place, largest) for cache in manifest.caches}


def _window(manifest: Manifest) -> int:
    """Return the number of tokens of a window: no cache may get full."""
    return min([_WINDOW, manifest.model.max_length, *(cache.most for cache in manifest.caches if cache.most)])


def _filled(executor: Executor, windows: Array, depth: Depth) -> KvCache:
    """Run windows int64 [rows, tokens], and return their caches."""
    rows, length = windows.shape
    prompt = max(1, int(_PROMPT * length))
    cache = executor.full_cache(rows, length)
    executor.prefill(cache, list(windows[:, :prompt]), depth=depth)
    for position in range(prompt, length):
        executor.step(cache, windows[:, position], depth)
    return cache


def _largest(cache: KvCache) -> dict[str, Array]:
    """Return the largest absolute entry of every channel: "{place}.key" -> float32 [kv_heads, channels]."""
    found = {}
    for name, buffer in cache.buffers.items():
        place, _, part = name.partition(".")
        if part in ("key", "value"):
            rows = [
                np.abs(row[:, :count]).max(axis=1, initial=0)
                for row, count in zip(buffer, cache.lengths[int(place)], strict=True)
            ]
            found[name] = np.max(rows, axis=0)
    return found


def _scales(place: int, largest: dict[str, Array]) -> CacheScales:
    key, value = (largest[f"{place}.{part}"] for part in ("key", "value"))
    if not (np.isfinite(key).all() and np.isfinite(value).all()):
        raise DynexportError(f"kv cache: layer {place}: expected finite keys and values on the text, found others")
    if not (key.any() or value.any()):
        raise DynexportError(
            f"kv cache: layer {place}: expected tokens of the text that run in it, found none; give a longer text"
        )
    return CacheScales(*(np.where(top > 0, top / _LARGEST, 1).astype(np.float32) for top in (key, value)))


__all__ = ["measure_scales", "with_int8_caches"]
