"""Give a written bundle int8 KV caches: run a text with float caches, and scale by the largest entry of a channel.

Rotary position embedding turns a pair of a key's channels by an angle that grows with the position. Positions of the
text are below 256, so a channel's largest entry there says nothing of later positions: with SmolLM2, 1.4 % of keys
after position 1,024 were beyond it. The length of the pair is the same at all positions, so it scales both channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from dynexport.exporter.bundle.options import CALIBRATION_TOKENS
from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.lowering.int8_caches import CacheScales, is_entry, make_caches_int8, scale_name
from dynexport.plugins.attention import NAME as ATTENTION
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import CachePart, CacheText, Depth, Limits, Manifest
from dynexport.runtime.bundle.text_files import TOKENIZER_FILE
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.measure.compared import rows_together, text_windows
from dynexport.runtime.text.text import Text

Array = np.ndarray
_BUILT_IN = Path(__file__).with_name("calibration_text.txt")
# Tokens of one window, and windows that run together.
_WINDOW, _ROWS = 256, 8
# Of each window, this share runs as a prompt and the rest as decode steps, which may run in other layers.
_PROMPT = 0.75
# Largest integer of an entry within the range of its scale.
LARGEST = 127


@dataclass(frozen=True)
class ScaleText:
    """A text to measure scales on.

    Attributes:
        ids: its token ids.
        source: as in the manifest's ``CacheText``.
    """

    ids: Sequence[int]
    source: Literal["built-in", "given"]


def scale_text(text: str | Sequence[int] | None, files: Mapping[str, bytes], option: str) -> ScaleText:
    """Return the text to measure on, as token ids.

    Args:
        text: a text, its token ids, or None for dynexport's own text.
        files: the checkpoint's tokenizer files.
        option: the option that gives the text, for messages.

    Raises:
        DynexportError: for a text, but no tokenizer.
    """
    if text is not None and not isinstance(text, str):
        return ScaleText(text, "given")
    if TOKENIZER_FILE not in files:
        raise DynexportError(
            f"{option}: expected {TOKENIZER_FILE} to read the text, found none; give --tokenizer, or token ids in "
            "Python"
        )
    tokenizer = Text.from_files(files)
    if text is None:
        return ScaleText(tokenizer.encode(_BUILT_IN.read_text(encoding="utf-8")), "built-in")
    return ScaleText(tokenizer.encode(text), "given")


def with_int8_caches(
    part: Path, manifest: Manifest, graphs: Sequence[ir.Model], text: ScaleText, architecture: Architecture
) -> Manifest:
    """Write a bundle's graphs again, with int8 caches; return the manifest that describes them.

    Args:
        part: the directory of the bundle, which has its graphs and weights.
        manifest: its manifest.
        graphs: the graphs in the manifest's order; they are changed in place.
        text: the text to measure scales on.
        architecture: says which channels of keys are rotated.

    Raises:
        DynexportError: for a text that is shorter than a window of 256 tokens (or of the context), or has unknown
            tokens; else as for ``measure_scales``.
    """
    windows = text_of_windows(manifest, text.ids)
    scales = measure_scales(Bundle(part, manifest), windows, architecture)
    prompts = {name for program in manifest.programs if program.phase == "prompt" for name in program.names}
    described = []
    for graph, model in zip(manifest.graphs, graphs, strict=True):
        make_caches_int8(model, scales, runs_prompts=graph.name in prompts)
        ir.save(model, part / graph.file)
        inputs, outputs = (
            tuple(spec.model_copy(update={"dtype": "int8"}) if is_entry(spec.name) else spec for spec in specs)
            for specs in (graph.inputs, graph.outputs)
        )
        described.append(graph.model_copy(update={"inputs": inputs, "outputs": outputs}))
    caches = [
        cache.model_copy(update={"parts": {name: _int8(part) for name, part in cache.parts.items()}})
        for cache in manifest.caches
    ]
    stored = manifest.cost
    cost = stored.model_copy(
        update={
            "kv_per_token": stored.kv_per_token // 4,
            "kv_of_layers": tuple(size // 4 for size in stored.kv_of_layers),
        }
    )
    return manifest.model_copy(
        update={
            "graphs": tuple(described),
            "caches": tuple(caches),
            "limits": _limits(manifest),
            "cost": cost,
            "cache_text": CacheText(
                source=text.source,
                tokens=windows.size,
                sha256=hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest(),
            ),
        }
    )


def _limits(manifest: Manifest) -> Limits:
    """Return the limits of a bundle with int8 caches.

    Around ONNX Runtime's attention a token that shares a call with others attends to their keys and values unrounded,
    also to its own: which tokens those are must not depend on other rows.
    """
    if ATTENTION in manifest.operators:
        return manifest.limits
    return manifest.limits.model_copy(update={"together": "never"})


def _int8(part: CachePart) -> CachePart:
    return part.model_copy(update={"dtype": "int8", "scale": scale_name(part.input)}) if is_entry(part.input) else part


def measure_scales(bundle: Bundle, windows: Array, architecture: Architecture) -> dict[int, CacheScales]:
    """Return the scales by place: the largest absolute entry of every channel on a text, divided by 127.

    For two channels of a key that are rotated together, it is the largest length of the pair.
    The text's windows run at every depth. A channel whose entries are all zero, such as padding, has the scale 1.

    Args:
        bundle: a bundle with float32 caches.
        windows: int64 [windows, tokens], token ids of the text; every window is a sequence of its own.
        architecture: says which channels of keys are rotated.

    Raises:
        DynexportError: for a text that leaves a cache empty, or entries that are no numbers.
    """
    manifest = bundle.manifest
    executor, rows = Executor(bundle), rows_together(bundle, _ROWS)
    largest: dict[str, Array] = {}
    for depth in (manifest.full, *manifest.depths):
        for start in range(0, len(windows), rows):
            for name, found in _largest(filled(executor, windows[start : start + rows], depth), architecture).items():
                largest[name] = np.maximum(largest.get(name, found), found)
    return {cache.place: _scales(cache.place, largest) for cache in manifest.caches if cache.parts}


def text_of_windows(manifest: Manifest, ids: Sequence[int]) -> Array:
    """Cut a text into windows, int64 [windows, tokens], in which no cache gets full."""
    window = min([_WINDOW, manifest.model.max_length, *(cache.most for cache in manifest.caches if cache.most)])
    return text_windows(ids, window, CALIBRATION_TOKENS, manifest.model.vocab_size)


def filled(executor: Executor, windows: Array, depth: Depth) -> KvCache:
    """Run windows int64 [rows, tokens], and return their caches."""
    rows, length = windows.shape
    prompt = max(1, int(_PROMPT * length))
    cache = executor.full_cache(rows, length)
    executor.prefill(cache, list(windows[:, :prompt]), depth=depth)
    for position in range(prompt, length):
        executor.step(cache, windows[:, position], depth)
    return cache


def _largest(cache: KvCache, architecture: Architecture) -> dict[str, Array]:
    """Return the largest entry of every channel: "{place}.key" -> float32 [kv_heads, channels]."""
    found = {}
    for name, buffer in cache.buffers.items():
        place, _, part = name.partition(".")
        if part in ("key", "value"):
            rotated = _rotated(architecture, int(place)) if part == "key" else 0
            rows = [
                _lengths(row[:, :count], rotated).max(axis=1, initial=0)
                for row, count in zip(buffer, cache.lengths[int(place)], strict=True)
            ]
            found[name] = np.max(rows, axis=0)
    return found


def _rotated(architecture: Architecture, layer: int) -> int:
    """Return the number of channels of a layer's keys that are rotated, from the first on."""
    positions = architecture.positions
    return positions.dim if isinstance(positions, Rotary) and architecture.rotary_layers[layer] else 0


def _lengths(entries: Array, rotated: int) -> Array:
    """Return absolute values of entries [.., channels], and for both channels of a rotated pair the pair's length."""
    found: Array = np.abs(entries)
    half = rotated // 2
    found[..., :half] = found[..., half:rotated] = np.hypot(entries[..., :half], entries[..., half:rotated])
    return found


def _scales(place: int, largest: dict[str, Array]) -> CacheScales:
    key, value = (largest[f"{place}.{part}"] for part in ("key", "value"))
    if not (np.isfinite(key).all() and np.isfinite(value).all()):
        raise DynexportError(f"kv cache: layer {place}: expected finite keys and values on the text, found others")
    if not (key.any() or value.any()):
        raise DynexportError(
            f"kv cache: layer {place}: expected tokens of the text that run in it, found none; give a longer text"
        )
    return CacheScales(*(np.where(top > 0, top / LARGEST, 1).astype(np.float32) for top in (key, value)))


__all__ = ["LARGEST", "ScaleText", "filled", "measure_scales", "scale_text", "text_of_windows", "with_int8_caches"]
