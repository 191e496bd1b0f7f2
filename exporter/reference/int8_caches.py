"""The int8 KV caches of a bundle, for the PyTorch reference.

Written from the operators' descriptions; it shares no code with the exporter. An entry x is stored as
q = clip(round(x / scale), -128, 127), halves to even, with a scale for each channel of each head. A token attends to
q * scale in place of x, also to its own, when it runs alone or by dynexport's operator. Around ONNX Runtime's, tokens
that run together in one call, such as a prompt's, attend to each other's x, and to q * scale of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dynexport.exporter.reference.dequantised import graph_nodes, tensor_values
from dynexport.exporter.reference.rounding import has_int8_caches
from dynexport.exporter.reference.seen_entries import IntArray, SeenEntries
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import PAST, Manifest

FloatArray = NDArray[np.float32]
Int8Array = NDArray[np.int8]
# By attention operator: its inputs that are caches, those that are their scales, and what its attributes must say.
_OPERATORS: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "CachedAttention": ((1, 2), (9, 10), {}),
    "GroupQueryAttention": (
        (3, 4),
        (12, 13),
        {"kv_cache_bit_width": 8, "k_quant_type": b"PER_CHANNEL", "v_quant_type": b"PER_CHANNEL"},
    ),
}
_LEAST, _MOST = -128, 127


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
        if node.op_type not in _OPERATORS:
            continue
        caches, scales, wanted = _OPERATORS[node.op_type]
        if not node.input[caches[0]].startswith(PAST):
            continue  # one that attends in float has widened entries in place of a cache
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if any(attributes.get(name) != value for name, value in wanted.items()) or len(node.input) <= scales[1]:
            raise DynexportError(f"{path}: {node.name}: expected int8 caches with a scale per channel, found others")
        for cache, scale in zip(caches, scales, strict=True):
            tensor = tensors.get(node.input[scale])
            values = np.zeros(0) if tensor is None else tensor_values(path.parent, tensor)
            if values.ndim != 4 or not (np.isfinite(values).all() and (values > 0).all()):
                raise DynexportError(f"{path}: {node.name}: expected positive scales of its cache, found others")
            found[node.input[cache].removeprefix(PAST)] = np.asarray(values[0, :, 0], np.float32)
    return found


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


__all__ = ["GivenEntries", "RoundedEntries", "Scales", "read_scales"]
