"""The int8 KV caches of a bundle, for the PyTorch reference.

Written from ONNX Runtime's description of GroupQueryAttention; it shares no code with the exporter. An entry x is
stored as q = clip(round(x / scale), -128, 127), halves to even, with a scale for each channel of each head. A token
attends to q * scale in place of x, also to its own, when it runs alone. Tokens that run together in one call, such as
a prompt's, attend to each other's x, and to q * scale of earlier ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dynexport.exporter.reference.dequantised import graph_nodes, is_quantised, tensor_values
from dynexport.exporter.reference.transformers_layers import Call, DecoderLayers
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import PAST, CachePart, Manifest

FloatArray = NDArray[np.float32]
Int8Array = NDArray[np.int8]
IntArray = NDArray[np.int64]
# The number of the call of a token that ran alone.
ALONE = -1
# Inputs of GroupQueryAttention: the caches, and their scales.
_CACHES, _SCALES = (3, 4), (12, 13)
_WANTED = {"kv_cache_bit_width": 8, "k_quant_type": b"PER_CHANNEL", "v_quant_type": b"PER_CHANNEL"}
_LEAST, _MOST = -128, 127


def has_int8_caches(manifest: Manifest) -> bool:
    """Return whether keys and values are stored as int8."""
    return any(part.dtype == "int8" for part in _stored(manifest))


def has_half_caches(manifest: Manifest) -> bool:
    """Return whether keys and values are stored as float16 between layers that compute in float32."""
    half = any(part.dtype == "float16" for part in _stored(manifest))
    return half and manifest.target == "onnxruntime"


def _stored(manifest: Manifest) -> list[CachePart]:
    return [cache.parts["key"] for cache in manifest.caches if cache.parts]


def has_rounded_caches(manifest: Manifest) -> bool:
    """Return whether keys and values are stored in fewer bits than they are computed in."""
    return has_int8_caches(manifest) or has_half_caches(manifest)


def is_rounded(manifest: Manifest) -> bool:
    """Return whether a bundle computes with other numbers than its checkpoint: rounded weights, keys or values."""
    return is_quantised(manifest) or has_rounded_caches(manifest)


@dataclass(frozen=True)
class Scales:
    """The scales of the caches of a bundle, by place: key and value, both float32 [kv_heads, cache_head_dim]."""

    by_place: Mapping[int, tuple[FloatArray, FloatArray]]

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Scales:
        """Read the scales from a bundle's graphs.

        Args:
            folder: the bundle's directory; its manifest file is not read.
            manifest: the bundle's manifest.

        Raises:
            DynexportError: when a graph has a cache without scales or two different ones, or scales that are not
                positive numbers.
        """
        found: dict[str, FloatArray] = {}
        for graph in manifest.files_with_graphs:
            for name, scale in _scales(folder / graph.file).items():
                if not np.array_equal(found.setdefault(name, scale), scale):
                    raise DynexportError(f"{folder}: {name}: expected the same scales in every graph, found others")
        places = sorted(cache.place for cache in manifest.caches if cache.parts)
        missing = [f"{p}.{part}" for p in places for part in ("key", "value") if f"{p}.{part}" not in found]
        if missing:
            raise DynexportError(f"{folder}: {PAST}{missing[0]}: expected scales of int8, found none; convert again")
        return cls({place: (found[f"{place}.key"], found[f"{place}.value"]) for place in places})


def read_scales(folder: Path, manifest: Manifest) -> Scales | None:
    """Return the scales of a bundle with rounded caches, as ``Scales.read``; None for float16."""
    return Scales.read(folder, manifest) if has_int8_caches(manifest) else None


def _scales(path: Path) -> dict[str, FloatArray]:
    """Return the scales in a graph: "{place}.key" -> float32 [kv_heads, cache_head_dim]."""
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in graph_nodes(model.graph):
        if node.op_type != "GroupQueryAttention" or not node.input[_CACHES[0]].startswith(PAST):
            continue  # one that attends in float has widened entries in place of a cache
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if any(attributes.get(name) != value for name, value in _WANTED.items()) or len(node.input) <= _SCALES[1]:
            raise DynexportError(f"{path}: {node.name}: expected int8 caches with a scale per channel, found others")
        for cache, scale in zip(_CACHES, _SCALES, strict=True):
            tensor = tensors.get(node.input[scale])
            values = np.zeros(0) if tensor is None else tensor_values(path.parent, tensor)
            if values.ndim != 4 or not (np.isfinite(values).all() and (values > 0).all()):
                raise DynexportError(f"{path}: {node.name}: expected positive scales of its cache, found others")
            found[node.input[cache].removeprefix(PAST)] = np.asarray(values[0, :, 0], np.float32)
    return found


class SeenEntries(ABC):
    """Stands in for transformers' cache: it says which keys and values tokens attend to.

    Args:
        calls: for every row int64 [tokens], the number of the call that each token ran in, or ``ALONE`` for one that
            attends to stored entries only.
    """

    def __init__(self, calls: Sequence[IntArray]) -> None:
        self._calls = calls

    def shown(self, decoder: DecoderLayers, call: Call, row: int, tokens: Any, place: int | None) -> Call:
        """Return a layer's arguments for tokens of a row, int64 [n], in which it takes keys and values from here.

        There are two of each: the token's own, for those that it ran together with, and the stored ones. ``place`` is
        that of the cache, if it is not the layer's number.
        """
        import torch

        each, calls = torch.arange(len(tokens)), torch.from_numpy(self._calls[row])[tokens]
        twice = decoder.pick(call, 0, 1, each, each.repeat(2))
        together = (calls[:, None] == calls) & (calls != ALONE)
        mask = decoder.mask(twice)
        unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(~torch.cat([together, ~together], dim=1), unseen)
        return decoder.with_cache(decoder.with_mask(twice, mask), _Shown(self, row, place))

    @abstractmethod
    def stored(self, layer: int, row: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Return what the cache holds for keys and values [1, kv_heads, tokens, head_dim] of a row, in their shapes."""


@dataclass(frozen=True)
class _Shown:
    """The cache that a layer gets for tokens of one row."""

    entries: SeenEntries
    row: int
    place: int | None

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Take new keys and values [1, kv_heads, tokens, head_dim] and return those to attend to, twice as many."""
        import torch

        stored = self.entries.stored(layer if self.place is None else self.place, self.row, keys, values)
        first, second = (torch.cat(pair, dim=2) for pair in zip((keys, values), stored, strict=True))
        return first, second


class RoundedEntries(SeenEntries):
    """Entries that are rounded here as an int8 cache would round them.

    Args:
        scales: the scales of the caches; the number of a layer is that of its cache.
        calls: as for ``SeenEntries``.
    """

    def __init__(self, scales: Scales, calls: Sequence[IntArray]) -> None:
        super().__init__(calls)
        self._scales = scales

    def stored(self, layer: int, row: int, keys: Any, values: Any) -> tuple[Any, Any]:
        rounded = [
            (part / scale).round().clamp(_LEAST, _MOST) * scale
            for part, scale in zip((keys, values), _broadcast(self._scales, layer, keys.shape[-1]), strict=True)
        ]
        return rounded[0], rounded[1]


class GivenEntries(SeenEntries):
    """Entries that an engine has stored.

    The reference then has the engine's rounding, and no rounding can flip. Its own keys and values are compared.

    Args:
        scales: as for ``RoundedEntries``.
        calls: as for ``SeenEntries``.
        rows: for every row of the coming pass, the entries of every place: int8 [kv_heads, entries, cache_head_dim].

    Attributes:
        furthest: per place, the largest distance between an own key or value and its entry, in steps of the scale;
            for one beyond the range of int8, the distance from the end of the range.
        clipped: per place, number of keys and values beyond the range of int8.
        largest: "{place}.key" and "{place}.value" -> the largest absolute value of their entries.
        entries: per place, number of keys and values.
    """

    def __init__(
        self,
        scales: Scales,
        calls: Sequence[IntArray],
        rows: Sequence[Mapping[int, tuple[Int8Array, Int8Array]]],
    ) -> None:
        super().__init__(calls)
        self._scales, self._rows = scales, rows
        self.furthest = dict.fromkeys(scales.by_place, 0.0)
        self.largest = {f"{place}.{part}": 0 for place in scales.by_place for part in ("key", "value")}
        self.clipped, self.entries = dict.fromkeys(scales.by_place, 0), dict.fromkeys(scales.by_place, 0)

    def stored(self, layer: int, row: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Return the entries of a row, and compare its keys and values with them.

        Raises:
            DynexportError: when the engine has stored another number of entries.
        """
        import torch

        shown = []
        for part, own, entries, scale in zip(
            ("key", "value"),
            (keys, values),
            self._rows[row][layer],
            _broadcast(self._scales, layer, keys.shape[-1]),
            strict=True,
        ):
            stored = torch.from_numpy(entries[None, :, :, : own.shape[-1]].astype(np.float32))
            if stored.shape != own.shape:
                raise DynexportError(
                    f"layer {layer}: expected {own.shape[2]} entries in the cache, found {stored.shape[2]}"
                )
            steps = own / scale
            kept = steps.clamp(_LEAST, _MOST)
            self.furthest[layer] = max(self.furthest[layer], float((kept - stored).abs().max()))
            self.largest[f"{layer}.{part}"] = max(self.largest[f"{layer}.{part}"], int(stored.abs().max()))
            self.clipped[layer] += int(((steps - kept).abs() > 1 / 2).sum())
            self.entries[layer] += steps.numel()
            shown.append(stored * scale)
        return shown[0], shown[1]


def _broadcast(scales: Scales, layer: int, head_dim: int) -> list[Any]:
    """Return a layer's scales without padding, as tensors [1, kv_heads, 1, head_dim]."""
    import torch

    return [torch.tensor(scale[None, :, None, :head_dim]) for scale in scales.by_place[layer]]


__all__ = [
    "ALONE",
    "GivenEntries",
    "RoundedEntries",
    "Scales",
    "SeenEntries",
    "has_half_caches",
    "has_int8_caches",
    "has_rounded_caches",
    "is_rounded",
    "read_scales",
]
