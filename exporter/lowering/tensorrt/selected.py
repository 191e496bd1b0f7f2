"""TensorRT lowering of one layer that stands for a pool: weights are stacked, and each row selects a layer's.

Rows have one token each: activations are [B, 1, ..].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.lowering.storage import Plain, Stacked, Storage, StoredWeight
from dynexport.exporter.lowering.target import Target, cast
from dynexport.exporter.lowering.tensorrt.target import TensorRT
from dynexport.plugins.graph import selected_matmul


class SelectedLayer(TensorRT):
    """A TensorRT target for a pool layer: SelectedMatMul reads only the chosen matrices; vectors are gathered.

    Call ``choose`` before anything is lowered.

    Attributes:
        layer: int64 [B], the layer of every row; 0 for a row that runs in none.

    Args:
        target: the target of the rest of the graph.
        layers: number of layers in the pool.
    """

    def __init__(self, target: Target, layers: int) -> None:
        assert isinstance(target, TensorRT)
        super().__init__(target.precision, target.max_batch, target.max_prompt, plugins=True)
        self._layers = layers
        self.vector_storage = Stacked(Plain(self.activations), layers)
        self.norm_storage = Stacked(Plain(), layers)
        self._ones: dict[int, ir.Value] = {}

    def choose(self, op: Any, index: ir.Value) -> None:
        """Set the layer of every row for the operators that follow.

        Args:
            op: builder of the graph.
            index: int64 [B], -1 for a row that runs in none. The results of such a row are undefined, and no matrix
                is read for it.
        """
        self._index, self.layer = index, op.Max(index, 0)

    def weight_storage(self, shape: Sequence[int]) -> Storage:
        return Stacked(Plain(self.activations), self._layers)

    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        tokens = op.Squeeze(cast(op, x, self.activations), [1])
        return op.Unsqueeze(selected_matmul(op, tokens, weight.parts[""], self._index), [1])

    def vector(self, op: Any, stored: ir.Value) -> ir.Value:
        return op.Unsqueeze(op.Gather(stored, self.layer), [1])

    def norm(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        """Normalise with a weight of ones, then scale each row by its layer's weight; ONNX norms take one weight."""
        assert x.shape is not None
        between = [*range(1, len(x.shape) - 1)]
        wide = cast(op, x, ir.DataType.FLOAT)
        kind = op.RMSNormalization if bias is None else op.LayerNormalization
        normed = kind(wide, self._ones_of(op, weight), axis=-1, epsilon=epsilon)
        scaled = op.Mul(normed, op.Unsqueeze(op.Gather(weight, self.layer), between))
        if bias is not None:
            scaled = op.Add(scaled, op.Unsqueeze(op.Gather(bias, self.layer), between))
        return cast(op, scaled, x.dtype)

    def _ones_of(self, op: Any, weight: ir.Value) -> ir.Value:
        """Return the constant float32 [features] of ones; the graph has it once per size."""
        assert weight.shape is not None
        features = weight.shape[1]
        assert isinstance(features, int)
        if features not in self._ones:
            ones = ir.tensor(np.ones(features, np.float32))
            self._ones[features] = op.builder.initializer(ones, f"ones_{features}", qualify=False)
        return self._ones[features]


__all__ = ["SelectedLayer"]
