"""Read the quantised weights of a bundle of precision int4, int8 or gguf back from its graphs, for the reference.

Written from ONNX Runtime's description of MatMulNBits and GatherBlockQuantized; it shares no code with the quantiser.
A value is (q - zero) * scale of its block, where q is an unsigned integer of 4 or 8 bits, the lower half of a byte
first, a block is ``block_size`` values along a row, and zero is 2^(bits - 1) or stored. Where sums of the input's
blocks follow the input, copy after copy, the values of their columns belong to every value of the block.

A matrix is matched to a parameter of the model by its values, not by its name in the graph: the root mean square of a
row's differences from the checkpoint's must be at most one quantisation step. Single values may be further away: those
at the ends of a block whose scale was fitted to all of it, and those that make up for the errors of others (GPTQ).
With precision gguf the values must be the checkpoint's own, but for the rounding of minima. A parameter without a match
keeps the checkpoint's values. If the bundle should have held it, the logits will differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from dynexport.exporter.reference.half_weights import HalfWeights
from dynexport.exporter.reference.interleaved import OPERATORS, Interleaved
from dynexport.plugins.fused import unfused
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest

FloatArray = NDArray[np.float32]
_OPERATORS = ("MatMulNBits", "GatherBlockQuantized")
_LAYER = re.compile(r"\.([0-9]+)\.")
# Tolerance, in quantisation steps: scales and products are rounded to float32.
_ROUNDING = 1e-3
# What is left of the minima of a row, as a share of the largest that the columns of sums hold: half of a 14th of a
# 7th for two stages of 4 bits, less for one of 8.
_LEFT = 1 / 190


def is_quantised(manifest: Manifest) -> bool:
    """Return whether the weights are MatMulNBits blocks.

    TensorRT bundles have other operators; they are compared with the float16 weights.
    """
    return manifest.target == "onnxruntime" and manifest.precision in ("int8", "int4", "gguf")


@dataclass(frozen=True)
class _Quantised:
    """A quantised matrix of a graph.

    Attributes:
        layer: layer number in its name; None for a matrix outside of the layers.
        folder: directory of the external weights file.
        data: packed integers, a tensor of the graph.
        scales: one scale per block, a tensor of the graph.
        zeros: one packed zero per block, a tensor of the graph; None for 2^(bits - 1).
        columns: number of columns; None where the rows consist of whole blocks.
        copies: how many copies of the sums of the input's blocks follow the columns.
        kept: whether the values are the checkpoint's own, and not rounded by up to one step.
        expert: the entry of the tensors, where they hold the matrices of several experts; else None.
    """

    layer: int | None
    folder: Path
    data: onnx.TensorProto
    scales: onnx.TensorProto
    zeros: onnx.TensorProto | None
    bits: int
    block_size: int
    columns: int | None
    copies: int
    kept: bool
    expert: int | None = None

    def read(self) -> tuple[FloatArray, FloatArray]:
        """Return the dequantised values and the tolerance of each, both float32 [rows, columns]."""
        scales = tensor_values(self.folder, self.scales, self.expert).astype(np.float32)
        packed = self._integers(tensor_values(self.folder, self.data, self.expert).reshape(*scales.shape, -1))
        if packed.shape[-1] != self.block_size:
            raise DynexportError(
                f"{self.folder}: {self.data.name}: expected blocks of {self.block_size} values, found "
                f"{packed.shape[-1]}; convert again"
            )
        zeros = np.full(scales.shape, 2 ** (self.bits - 1), np.float32)
        if self.zeros is not None:
            stored = tensor_values(self.folder, self.zeros, self.expert).reshape(len(scales), -1)
            zeros = self._integers(stored)[:, : scales.shape[1]].astype(np.float32)
        values = (packed.astype(np.float32) - zeros[..., None]) * scales[..., None]
        rows, columns = len(scales), self.columns or scales.shape[1] * self.block_size
        values, steps = values.reshape(rows, -1), np.repeat(np.abs(scales), self.block_size, axis=1)
        room = steps[:, :columns] * np.float32(_ROUNDING if self.kept else 1 + _ROUNDING)
        if not self.copies:
            return values[:, :columns], room
        count = columns // self.block_size
        sums = values[:, columns : columns + self.copies * count].reshape(rows, self.copies, count).sum(axis=1)
        room += np.abs(sums).max(axis=1, keepdims=True) * np.float32(_LEFT)
        return values[:, :columns] + np.repeat(sums, self.block_size, axis=1), room

    def _integers(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the integers of bytes [.., n]: [.., n] of 8 bits, [.., 2 n] of 4 bits."""
        if self.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


class DequantisedWeights:
    """The quantised matrices of a bundle.

    Args:
        folder: the bundle's directory; its manifest file is not read.
        manifest: the bundle's manifest.

    Raises:
        DynexportError: when a graph differs from what ``convert`` writes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        found = {
            (matrix.layer, matrix.data.name, matrix.expert): matrix
            for graph in manifest.files_with_graphs
            for matrix in _quantised(folder / graph.file, kept=manifest.precision == "gguf")
        }
        self._by_layer: dict[int | None, list[_Quantised | _Plugged]] = {}
        for matrix in found.values():
            self._by_layer.setdefault(matrix.layer, []).append(matrix)

    def stored(self, name: str, weight: FloatArray) -> FloatArray:
        """Return the bundle's values of one parameter of the transformers model.

        Args:
            name: parameter name in the model.
            weight: the checkpoint's values, float32.

        Returns:
            float32 of the same shape: the dequantised values, or ``weight`` itself where the bundle does not
            quantise this parameter.
        """
        if weight.ndim not in (2, 3):
            return weight
        matrices = self._by_layer.get(_layer_of(name), [])
        if weight.ndim == 2:
            found = _as_stored(weight, [matrix for matrix in matrices if matrix.expert is None])
            return weight if found is None else found
        experts = [
            _as_stored(one, [matrix for matrix in matrices if matrix.expert == expert])
            for expert, one in enumerate(weight)
        ]
        return weight if any(one is None for one in experts) else np.stack(experts)  # type: ignore[arg-type]


def stored_weights(folder: Path, manifest: Manifest) -> DequantisedWeights | HalfWeights | None:
    """Return the rounded matrices of a bundle for ONNX Runtime; None where it has those of the checkpoint."""
    if is_quantised(manifest):
        return DequantisedWeights(folder, manifest)
    halves = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return HalfWeights(halves[manifest.precision]) if manifest.precision in halves else None


def _as_stored(weight: FloatArray, matrices: Sequence[_Quantised | _Plugged]) -> FloatArray | None:
    """Return a matrix of the model as one of these holds it, or None."""
    for transposed in (False, True):  # gpt2 and gpt_oss store matrices transposed
        found = _find(weight.T if transposed else weight, matrices)
        if found is not None:
            return np.ascontiguousarray(found.T if transposed else found)
    return None


def _find(weight: FloatArray, matrices: Sequence[_Quantised | _Plugged]) -> FloatArray | None:
    """Return the rows of these matrices that match the weight's rows, or None."""
    parts = [
        part for part in (_same_columns(*matrix.read(), weight.shape[1]) for matrix in matrices) if part is not None
    ]
    for values, room in parts:
        found = _consecutive(weight, values, room)
        if found is not None:
            return found
    if not parts:
        return None
    # Rows may stand in another order or in several matrices, so take the nearest row for each.
    values, room = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    distance = (values * values).sum(axis=1) - 2 * (weight @ values.T)
    nearest = distance.argmin(axis=1)
    return values[nearest] if _near(weight, values[nearest], room[nearest]).all() else None


def _same_columns(values: FloatArray, room: FloatArray, columns: int) -> tuple[FloatArray, FloatArray] | None:
    """Return values and room without the zero columns that pad heads; None if the number of columns differs."""
    if values.shape[1] == columns:
        return values, room
    used = values.any(axis=0)
    return (values[:, used], room[:, used]) if used.sum() == columns else None


def _consecutive(weight: FloatArray, values: FloatArray, room: FloatArray) -> FloatArray | None:
    """Return consecutive rows of a matrix that match the weight's rows, or None."""
    rows = len(weight)
    for start in np.flatnonzero(_near(weight[:1], values, room)):
        part = slice(start, start + rows)
        if start + rows <= len(values) and _near(weight, values[part], room[part]).all():
            return values[part]
    return None


def _near(weight: FloatArray, values: FloatArray, room: FloatArray) -> NDArray[np.bool_]:
    """Return bool [rows], whether the differences of a row are within the room, as root mean squares."""
    near: NDArray[np.bool_] = np.square(values - weight).sum(axis=1) <= np.square(room).sum(axis=1)
    return near


@dataclass(frozen=True)
class _Plugged:
    """A matrix of our CPU operators; attributes as in ``_Quantised``."""

    layer: int | None
    folder: Path
    data: onnx.TensorProto
    scales: onnx.TensorProto
    minima: onnx.TensorProto
    attributes: Mapping[str, int]
    kept: bool
    expert: None = None

    def read(self) -> tuple[FloatArray, FloatArray]:
        """Return the dequantised values and the tolerance of each, both float32 [rows, columns]."""
        data, scales, minima = (tensor_values(self.folder, part) for part in (self.data, self.scales, self.minima))
        rows, bits, zero = (self.attributes[name] for name in ("N", "bits", "zero"))
        values, steps = Interleaved(data, scales, minima, rows, bits, zero).read()
        return values, steps * np.float32(_ROUNDING if self.kept else 1 + _ROUNDING)


def _plugged(path: Path, node: Any, tensors: Mapping[str, onnx.TensorProto], kept: bool) -> _Plugged:
    if any(name not in tensors for name in node.input[1:]):
        raise DynexportError(f"{path}: {node.name}: expected stored values, found something else; convert again")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    data, scales, minima = (tensors[name] for name in node.input[1:])
    return _Plugged(_layer_of(node.input[1]), path.parent, data, scales, minima, attributes, kept)


def _quantised(path: Path, *, kept: bool) -> Iterator[_Quantised | _Plugged]:
    """Yield the quantised matrices of a graph and of its branches."""
    model = ir.to_proto(unfused(ir.from_proto(onnx.load(path, load_external_data=False))))
    nodes = list(graph_nodes(model.graph))
    tensors = {tensor.name: tensor for graph in _graphs(model.graph) for tensor in graph.initializer}
    producers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type in OPERATORS:
            yield _plugged(path, node, tensors, kept)
        if node.op_type == "QMoE":
            yield from _experts(path, node, tensors)
        if node.op_type not in _OPERATORS:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        table, scales, zeros = node.input[1 if node.op_type == "MatMulNBits" else 0], node.input[2], node.input[3:]
        if table in producers and producers[table].op_type == "Reshape":
            table = producers[table].input[0]
        if len(zeros) > 1 or any(name not in tensors for name in (table, scales, *zeros)):
            raise DynexportError(
                f"{path}: {node.name}: expected stored values, scales and zero points, found something else; convert "
                "again"
            )
        bits, block, columns, copies = int(attributes["bits"]), int(attributes["block_size"]), attributes.get("K"), 0
        if kept and zeros and columns is not None:
            copies = len(producers[node.input[0]].input) - 1  # of a Concat
            columns = columns * block // (block + copies)
        elif kept and zeros:
            (split,) = (other for other in nodes if other.op_type == "Split" and other.input[0] == node.output[0])
            columns, width = tensor_values(path.parent, tensors[split.input[1]]).tolist()[:2]
            copies = width * block // columns
        yield _Quantised(
            layer=_layer_of(table),
            folder=path.parent,
            data=tensors[table],
            scales=tensors[scales],
            zeros=tensors[zeros[0]] if zeros else None,
            bits=bits,
            block_size=block,
            columns=columns,
            copies=copies,
            kept=kept,
        )


def _experts(path: Path, node: Any, tensors: Mapping[str, onnx.TensorProto]) -> Iterator[_Quantised]:
    """Yield the matrices of all experts of a QMoE: input, scores, then data, scales and bias of its two products."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for data, scales, zeros in ((2, 3, 11), (5, 6, 12)):
        stored = tensors[node.input[data]]
        for expert in range(stored.dims[0]):
            yield _Quantised(
                layer=_layer_of(stored.name),
                folder=path.parent,
                data=stored,
                scales=tensors[node.input[scales]],
                zeros=tensors[node.input[zeros]] if len(node.input) > zeros else None,
                bits=attributes["expert_weight_bits"],
                block_size=attributes["block_size"],
                columns=None,
                copies=0,
                kept=False,
                expert=expert,
            )


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def graph_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graph_nodes(attribute.g)


def tensor_values(folder: Path, tensor: onnx.TensorProto, item: int | None = None) -> NDArray[Any]:
    """Return a tensor's values, or an entry along its first axis, from the graph or from its external weights file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        whole = np.asarray(onnx.numpy_helper.to_array(tensor))
        return whole if item is None else np.asarray(whole[item])
    where: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / Path(where["location"]).name
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    dims = tuple(tensor.dims) if item is None else tuple(tensor.dims)[1:]
    count = int(np.prod(dims))
    start = int(where.get("offset", 0)) + (item or 0) * count * dtype.itemsize
    values = np.fromfile(file, dtype, count, offset=start)
    if values.size != count:
        raise DynexportError(f"{file}: {tensor.name}: expected {count} values, found {values.size}; convert again")
    return values.reshape(dims)


def _layer_of(name: str) -> int | None:
    match = _LAYER.search(name)
    return None if match is None else int(match[1])
