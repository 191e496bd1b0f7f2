"""The weights that an int4 or int8 bundle computes with, read back from its graphs for the PyTorch reference.

Written from ONNX Runtime's description of MatMulNBits and GatherBlockQuantized, with no code of what quantises: a value
is (q - 2^(bits - 1)) * scale of its block, where q is an unsigned integer of 4 or 8 bits, the lower half of a byte
first, and a block is ``block_size`` values along a row.

Which parameter of the model a matrix stands for is found by its values, whatever the graph calls it: every one must be
within a step of quantisation of the checkpoint's. A parameter that nothing in the bundle is so near to stays as it is
in the checkpoint: then the bundle does not hold it, and its logits will show that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest

FloatArray = NDArray[np.float32]
_OPERATORS = ("MatMulNBits", "GatherBlockQuantized")
_LAYER = re.compile(r"\.([0-9]+)\.")
# Of a step of quantisation: scales and products are rounded to float32.
_ROOM = 1 + 1e-3


def is_quantised(manifest: Manifest) -> bool:
    """Whether weights are blocks of MatMulNBits; graphs for TensorRT have other operators, and are held to float16."""
    return manifest.target == "onnxruntime" and manifest.precision in ("int8", "int4")


@dataclass(frozen=True)
class _Quantised:
    """A matrix in a file of weights, float32 [rows, columns] once it is read.

    Attributes:
        layer: that its name has, where to look first; None: it belongs to none.
        data, scales: tensors of the graph, in ``folder`` where they are not in the graph itself.
        columns: None: as many as there are in whole blocks.
    """

    layer: int | None
    folder: Path
    data: onnx.TensorProto
    scales: onnx.TensorProto
    bits: int
    block_size: int
    columns: int | None

    def read(self) -> tuple[FloatArray, FloatArray]:
        """Values, and the step of each: float32 [rows, columns] both."""
        scales = _values(self.folder, self.scales).astype(np.float32)
        packed = _values(self.folder, self.data).reshape(*scales.shape, -1)
        if self.bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, -1)
        if packed.shape[-1] != self.block_size:
            raise DynexportError(
                f"{self.folder}: {self.data.name}: expected blocks of {self.block_size} values, found "
                f"{packed.shape[-1]}; convert again"
            )
        values = (packed.astype(np.float32) - 2 ** (self.bits - 1)) * scales[..., None]
        rows, columns = len(scales), self.columns or scales.shape[1] * self.block_size
        steps = np.repeat(np.abs(scales), self.block_size, axis=1)
        return values.reshape(rows, -1)[:, :columns], steps[:, :columns]


class DequantisedWeights:
    """The quantised matrices of a bundle.

    Args:
        folder: the bundle's directory, which may still be without its manifest.
        manifest: of the bundle.

    Raises:
        DynexportError: for graphs that are not as ``convert`` writes them.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        found = {
            (matrix.layer, matrix.data.name): matrix
            for graph in manifest.graphs
            for matrix in _quantised(folder / graph.file)
        }
        self._by_layer: dict[int | None, list[_Quantised]] = {}
        for matrix in found.values():
            self._by_layer.setdefault(matrix.layer, []).append(matrix)

    def stored(self, name: str, weight: FloatArray) -> FloatArray:
        """What the bundle has for a parameter of transformers' model.

        Args:
            name: its name there.
            weight: float32, as the checkpoint has it.

        Returns:
            float32 of the same shape: the bundle's values, or ``weight`` itself where it has not quantised it.
        """
        if weight.ndim != 2:
            return weight
        matrices = self._by_layer.get(_layer_of(name), [])
        for transposed in (False, True):  # as gpt2 has its projections
            wanted = weight.T if transposed else weight
            found = _find(wanted, matrices)
            if found is not None:
                return np.ascontiguousarray(found.T if transposed else found)
        return weight


def _find(weight: FloatArray, matrices: list[_Quantised]) -> FloatArray | None:
    """The rows of these matrices that are within a step of a weight's rows; None where there are none."""
    parts = [
        part for part in (_same_columns(*matrix.read(), weight.shape[1]) for matrix in matrices) if part is not None
    ]
    for values, steps in parts:
        found = _consecutive(weight, values, steps)
        if found is not None:
            return found
    if not parts:
        return None
    # Rows in another order, or of several matrices: each is the one nearest to it.
    values, steps = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    distance = (values * values).sum(axis=1) - 2 * (weight @ values.T)
    nearest = distance.argmin(axis=1)
    return values[nearest] if _near(weight, values[nearest], steps[nearest]) else None


def _same_columns(values: FloatArray, steps: FloatArray, columns: int) -> tuple[FloatArray, FloatArray] | None:
    """A matrix with so many columns, those of zeros (between heads that were padded) left out; None: it has others."""
    if values.shape[1] == columns:
        return values, steps
    used = values.any(axis=0)
    return (values[:, used], steps[:, used]) if used.sum() == columns else None


def _consecutive(weight: FloatArray, values: FloatArray, steps: FloatArray) -> FloatArray | None:
    """Rows that follow one another in a matrix and are within a step of a weight's rows."""
    rows = len(weight)
    for start in np.flatnonzero((np.abs(values - weight[0]) <= steps * _ROOM).all(axis=1)):
        part = slice(start, start + rows)
        if start + rows <= len(values) and _near(weight, values[part], steps[part]):
            return values[part]
    return None


def _near(weight: FloatArray, values: FloatArray, steps: FloatArray) -> bool:
    return bool((np.abs(values - weight) <= steps * _ROOM).all())


def _quantised(path: Path) -> Iterator[_Quantised]:
    """The quantised matrices of a graph, those of its branches among them."""
    model = onnx.load(path, load_external_data=False)
    nodes = list(_nodes(model.graph))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    reshaped = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Reshape"}
    for node in nodes:
        if node.op_type not in _OPERATORS:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        table, scales = node.input[1 if node.op_type == "MatMulNBits" else 0], node.input[2]
        table = reshaped.get(table, table)
        if len([name for name in node.input if name]) != 3 or table not in tensors or scales not in tensors:
            raise DynexportError(
                f"{path}: {node.name}: expected stored values and scales without zero points, found something else; "
                "convert again"
            )
        bits, block = int(attributes["bits"]), int(attributes["block_size"])
        yield _Quantised(
            _layer_of(table), path.parent, tensors[table], tensors[scales], bits, block, attributes.get("K")
        )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _values(folder: Path, tensor: onnx.TensorProto) -> NDArray[Any]:
    """A tensor's values, from the graph or the file of weights beside it."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    where: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / Path(where["location"]).name
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims))
    values = np.fromfile(file, dtype, count, offset=int(where.get("offset", 0)))
    if values.size != count:
        raise DynexportError(f"{file}: {tensor.name}: expected {count} values, found {values.size}; convert again")
    return values.reshape(tuple(tensor.dims))


def _layer_of(name: str) -> int | None:
    match = _LAYER.search(name)
    return None if match is None else int(match[1])
