"""The inputs of one step - S new tokens per row on top of what is cached - and what all layers derive from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.architecture import Alibi, Architecture, Rotary

INT64, BOOL, FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT
# Added to the score of a key outside the window: exp() of it is 0, and no sum of it overflows.
_MASKED = -1e30


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache, as input or output: key and value float32 [B, kv_heads, M, head_dim].

    Attributes:
        position: int64 [B, M], the original position of every entry, for layers that need it.
    """

    key: ir.Value
    value: ir.Value
    position: ir.Value | None = None

    def values(self) -> list[ir.Value]:
        """The tensors that exist, in the order of the graph's inputs."""
        return [self.key, self.value] + ([] if self.position is None else [self.position])


@dataclass(frozen=True)
class Step:
    """Values that all layers share.

    Attributes:
        row_of: layer -> its row in cache_lengths, last_index, total_length and layer_active.
        position_ids: int64 [B, S], original positions of the new tokens.
        cache_lengths: int64 [L, B], entries in every layer's cache before the step.
        last_index: int32 [L, B], cache_lengths + S - 1.
        total_length: int32 [L], the longest row's entries after the step.
        cos, sin: float32 [B, S, rotary dim / 2] of the new tokens, or None.
        bias: the attention bias of layers whose entries are never out of step with their positions, by window.
        layer_active: bool [L], in a graph that can skip layers.
    """

    architecture: Architecture
    row_of: dict[int, int]
    position_ids: ir.Value
    cache_lengths: ir.Value
    last_index: ir.Value
    total_length: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None
    bias: dict[int | None, ir.Value]
    layer_active: ir.Value | None

    @classmethod
    def prepare(
        cls,
        op: Any,
        architecture: Architecture,
        input_ids: ir.Value,
        position_ids: ir.Value,
        cache_lengths: ir.Value,
        layer_active: ir.Value | None,
        *,
        layers: tuple[int, ...],
        contiguous: bool,
    ) -> Step:
        """Compute the shared values once, before the first layer.

        Args:
            layers: the layers of the graph; rows of ``cache_lengths`` and ``layer_active`` follow them.
            contiguous: every cache holds exactly the positions 0, 1, 2, .. (nothing is ever skipped), so that
                biases depend on the step alone and are computed here rather than in every layer.
        """
        length = op.Shape(input_ids, start=1, end=2)
        total = op.Add(op.ReduceMax(cache_lengths, [1], keepdims=0), length)
        cos, sin = _rotation(op, architecture, position_ids)
        step = cls(
            architecture=architecture,
            row_of={layer: row for row, layer in enumerate(layers)},
            position_ids=position_ids,
            cache_lengths=cache_lengths,
            last_index=op.Cast(op.Sub(op.Add(cache_lengths, length), 1), to=ir.DataType.INT32),
            total_length=op.Cast(total, to=ir.DataType.INT32),
            cos=cos,
            sin=sin,
            bias={},
            layer_active=layer_active,
        )
        windows = {architecture.windows[i] for i in layers if architecture.needs_key_positions(i)}
        if contiguous and windows:
            keys = op.Unsqueeze(op.Range(0, op.Gather(total, 0), 1), [0])
            step.bias.update({window: step.attention_bias(op, keys, window) for window in windows})
        return step

    def attention_bias(self, op: Any, key_positions: ir.Value, window: int | None) -> ir.Value:
        """What ALiBi and a window add to the scores of a layer that has one of them.

        Args:
            key_positions: int64 [B or 1, T].
            window: positions that a query sees, its own included.

        Returns:
            float32 [B or 1, 1 or heads, S, T].
        """
        distance = op.Sub(op.Unsqueeze(key_positions, [1]), op.Unsqueeze(self.position_ids, [2]))
        terms = []
        if window is not None:
            terms.append(op.Unsqueeze(op.Where(op.Greater(distance, -window), 0.0, _MASKED), [1]))
        if isinstance(self.architecture.positions, Alibi):
            slopes = op.initializer(ir.tensor(self.architecture.positions.slopes()[:, None, None]), "alibi_slopes")
            terms.append(op.Mul(op.Cast(op.Unsqueeze(distance, [1]), to=FLOAT), slopes))
        bias: ir.Value = reduce(op.Add, terms)
        return bias


def _rotation(op: Any, architecture: Architecture, position_ids: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    # Computed, not looked up: tables for a context of a million tokens would be half a gigabyte in every graph.
    if not isinstance(architecture.positions, Rotary):
        return None, None
    values = np.asarray(architecture.positions.inverse_frequencies, dtype=np.float32)
    frequencies = op.initializer(ir.tensor(values), "inverse_frequencies")
    angles = op.Mul(op.Cast(op.Unsqueeze(position_ids, [-1]), to=FLOAT), frequencies)
    return op.Cos(angles), op.Sin(angles)
