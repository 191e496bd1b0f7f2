"""ONNX Runtime lowering of one layer that stands for a pool: weights are stacked, and each row selects a layer's.

Rows have one token each: activations are [B, 1, ..]. Products of a row without a layer are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.lowering.interleaved import Interleaved
from dynexport.exporter.lowering.plugged_onnxruntime import PluggedOnnxRuntime
from dynexport.exporter.lowering.storage import Plain, Stacked, Storage, StoredWeight
from dynexport.plugins.selections import selected_add_norm, selected_float_matmul, selected_norm
from dynexport.runtime.bundle.errors import DynexportError


class SelectedOnnxRuntime(PluggedOnnxRuntime):
    """An ONNX Runtime target for a pool layer, by dynexport's CPU operators.

    Call ``choose`` before anything is lowered.

    Args:
        target: the target of the rest of the graph.
        layers: number of layers in the pool.
    """

    def __init__(self, target: PluggedOnnxRuntime, layers: int) -> None:
        super().__init__(target.precision)
        self.storage, self._layers = target.storage, layers
        self.vector_storage = self.norm_storage = Stacked(Plain(), layers)

    def choose(self, op: Any, index: ir.Value) -> None:
        """Set the layer of every row, int64 [B], -1 for none, for the operators that follow."""
        self._index = index

    def weight_storage(self, shape: Sequence[int]) -> Storage:
        single = super().weight_storage(shape)
        if not isinstance(single, Interleaved) and single != Plain():
            raise DynexportError(
                f"--plugins: expected matrices of whole blocks for radial with precision {self.precision}, found one "
                f"of {shape[1]} columns; choose another precision, or leave out --plugins"
            )
        return Stacked(single, self._layers)

    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        assert isinstance(weight.storage, Stacked)
        if isinstance(weight.storage.single, Interleaved):
            return weight.storage.single.multiply_chosen(op, x, self._index, weight)
        return selected_float_matmul(op, x, self._index, weight.parts[""])

    def vector(self, op: Any, stored: ir.Value) -> ir.Value:
        """Return each row's vector, [B, 1, features]; zeros for a row without a layer, which then keeps its values."""
        index = op.Unsqueeze(self._index, [1])
        found = op.Where(op.Less(index, 0), 0.0, op.Gather(stored, op.Max(self._index, 0)))
        return op.Unsqueeze(found, [1])

    def norm(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        if bias is None:
            return selected_norm(op, x, self._index, weight, epsilon)
        assert weight.shape is not None
        ones = op.Constant(value=ir.tensor(np.ones(weight.shape.numpy()[1:], np.float32)))
        normed = op.LayerNormalization(x, ones, axis=-1, epsilon=epsilon)
        scale = op.Unsqueeze(op.Gather(weight, op.Max(self._index, 0)), [1])
        y: ir.Value = op.Add(op.Mul(normed, scale), self.vector(op, bias))
        return y

    def add_norm(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        epsilon: float,
    ) -> tuple[ir.Value, ir.Value]:
        if bias is None:
            return selected_add_norm(op, x, self._index, weight, epsilon, residual)
        total = op.Add(x, residual)
        return self.norm(op, total, weight, bias, epsilon), total


__all__ = ["SelectedOnnxRuntime"]
