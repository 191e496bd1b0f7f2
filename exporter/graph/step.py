"""The inputs of one step (S new tokens per row after the cached ones), and the values that layers derive from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Alibi, Architecture, Rotary
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target

INT64, INT32, BOOL, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT
# Added to the score of a key outside the window: exp() gives 0, and sums of it stay finite.
_MASKED = -1e30


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache, as input or output.

    Attributes:
        key: [B, kv_heads, M, cache_head_dim]; None for a layer without attention, which has no cache.
        value: like ``key``.
        position: int64 [B, M], the original position of every entry, for layers that need it.
    """

    key: ir.Value | None = None
    value: ir.Value | None = None
    position: ir.Value | None = None

    @property
    def entries(self) -> tuple[ir.Value, ir.Value]:
        """Key and value of a layer with attention."""
        assert self.key is not None and self.value is not None
        return self.key, self.value

    def values(self) -> list[ir.Value]:
        """Return the cache's tensors in the order of the graph's inputs, without absent ones."""
        return [value for value in (self.key, self.value, self.position) if value is not None]


@dataclass(frozen=True)
class Frequencies:
    """The constants of rotary angles.

    Attributes:
        inverse: the constant float32 [rotary dim / 2] that positions are multiplied by.
        factor: multiplies cos and sin; a number, or float32 that broadcasts with them.
    """

    inverse: ir.Value
    factor: float | ir.Value


@dataclass(frozen=True)
class Rotation:
    """Rotary angles, multiplied by the attention factor of yarn and longrope.

    Attributes:
        cos: float32 [max_length, rotary dim / 2] of every position, for an attention kernel that applies the rotation;
            or [B, S, rotary dim / 2] of the step's tokens.
        sin: like ``cos``.
        of_every_position: whether cos and sin cover every position.
    """

    cos: ir.Value
    sin: ir.Value
    of_every_position: bool


@dataclass(frozen=True)
class StepInputs:
    """The inputs common to all graphs of a whole step.

    Attributes:
        input_ids: int64 [B, S].
        position_ids: int64 [B, S].
        cache_lengths: int64 [L, B], entries in each layer's cache before the step.
        layer_active: bool [L], in a graph that can skip layers.
        logits_indices: int64 [B, K].
        frequencies: the constants of rotary angles; None without rotary positions.
        sliding_frequencies: those of layers with a window, where they have their own.
    """

    input_ids: ir.Value
    position_ids: ir.Value
    cache_lengths: ir.Value
    layer_active: ir.Value | None
    logits_indices: ir.Value
    frequencies: Frequencies | None
    sliding_frequencies: Frequencies | None = None


class Line(Protocol):
    """The N tokens of all rows that run in a layer, concatenated: only attention needs them by row."""

    def attend(
        self, op: Any, projected: ir.Value, attend: AttendRows, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Return the attention of packed tokens [N, heads * head_dim], and the cache with the tokens appended.

        Args:
            op: writes operators into the graph.
            projected: their packed query, key and value, [N, features].
            attend: writes the attention of tokens by row.
            cache: the layer's cache.
        """


@dataclass(frozen=True)
class LayerStep:
    """One layer's inputs about its S tokens; a routed layer's tokens are those that run in it.

    Attributes:
        position_ids: int64 [B, S], their original positions; None if the layer does not use them.
        rotation: rotary angles, or None.
        cache_length: int64 [B], entries in the layer's cache before the step.
        last_index: int32 [B], cache_length + S - 1.
        total_length: int32 scalar, the longest row's entries after the step; None for caches with a fixed number of
            slots, where attention reads all slots.
        bias: float32 [B or 1, 1 or heads, S, total_length or M], added to the scores for windows and ALiBi; None if
            attention computes it from the positions in the cache, or if the layer has neither.
        counts: int64 [B], number of the S tokens to append, for a call that appends to one cache several times; None
            for a call that appends once, where padding stands after all entries.
        append_later: whether attention returns the new entry instead of the cache, to be appended outside; every row
            then has one token.
    """

    position_ids: ir.Value | None
    rotation: Rotation | None
    cache_length: ir.Value
    last_index: ir.Value
    total_length: ir.Value | None
    bias: ir.Value | None = None
    counts: ir.Value | None = None
    append_later: bool = False


# Attends for packed query, key and value [B, C, features], C tokens per row: [B, C, heads * head_dim], and the cache.
AttendRows = Callable[[Any, ir.Value, LayerStep], tuple[ir.Value, LayerCache]]


@dataclass(frozen=True)
class Step:
    """The values of a step that all layers share; ``for_layer`` selects one layer's part.

    Attributes:
        architecture: the model's architecture.
        inputs: the graph's inputs.
        layers: the graph's layers, in row order of cache_lengths, layer_active, last_index and total_length.
        rotation: rotary angles, or None.
        sliding_rotation: those of layers with a window, where they have their own.
        last_index: int32 [L, B], cache_lengths + S - 1.
        total_length: int32 [L], the longest row's entries after the step; None for caches with a fixed number of slots.
        contiguous: layers that run every token; their caches hold the positions 0, 1, 2, .. without gaps.
        alike: window -> inputs of the contiguous layers with this window, computed once.
        together: layer -> inputs shared by a group of layers with equal cache lengths.
    """

    architecture: Architecture
    inputs: StepInputs
    layers: tuple[int, ...]
    rotation: Rotation | None
    sliding_rotation: Rotation | None
    last_index: ir.Value
    total_length: ir.Value | None
    contiguous: tuple[int, ...]
    alike: dict[int | None, LayerStep]
    together: dict[int, LayerStep]

    @classmethod
    def prepare(cls, op: Any, architecture: Architecture, inputs: StepInputs, plan: GraphPlan, target: Target) -> Step:
        """Compute the shared values once, before the first layer."""
        kernel_rotates = target.rotates_in_attention(architecture)
        length = op.Shape(inputs.input_ids, start=1, end=2)
        rotated = op.Range(0, architecture.max_length, 1) if kernel_rotates else inputs.position_ids
        total = None
        if not target.fixed_slots:
            total = op.Add(op.ReduceMax(inputs.cache_lengths, [1], keepdims=0), length)
        step = cls(
            architecture=architecture,
            inputs=inputs,
            layers=plan.layers,
            rotation=rotation(op, inputs.frequencies, rotated, of_every_position=kernel_rotates),
            sliding_rotation=rotation(op, inputs.sliding_frequencies, rotated, of_every_position=kernel_rotates),
            last_index=op.Cast(op.Sub(op.Add(inputs.cache_lengths, length), 1), to=INT32),
            total_length=None if total is None else op.Cast(total, to=INT32),
            contiguous=plan.contiguous,
            alike={},
            together={},
        )
        step._tell_alike(op, total)
        for group in plan.together:
            step.together.update(dict.fromkeys(group, step._gathered(op, group[0])))
        return step

    def _tell_alike(self, op: Any, total: ir.Value | None) -> None:
        """Compute the inputs of contiguous layers, once per window; ``total`` is int64 [L], or None."""
        for layer in self.contiguous:
            window = self.architecture.windows[layer]
            if window not in self.alike:
                bias = None
                if self.architecture.needs_key_positions(layer):
                    slots = self.architecture.max_length
                    count = slots if total is None else op.Gather(total, self.row_of(layer))
                    keys = op.Unsqueeze(op.Range(0, count, 1), [0])
                    bias = attention_bias(op, self.architecture, layer, self.inputs.position_ids, keys)
                self.alike[window] = replace(self._gathered(op, layer), bias=bias)

    def row_of(self, layer: int) -> int:
        """Return the layer's row in tensors of shape [L, ..]."""
        return self.layers.index(layer)

    def for_layer(self, op: Any, layer: int) -> LayerStep:
        """Return the inputs of a layer that runs all tokens."""
        if layer in self.contiguous:
            return self.alike[self.architecture.windows[layer]]
        together = self.together.get(layer)
        return replace(together, rotation=self._rotation_of(layer)) if together else self._gathered(op, layer)

    def _rotation_of(self, layer: int) -> Rotation | None:
        slides = self.sliding_rotation is not None and self.architecture.windows[layer] is not None
        return self.sliding_rotation if slides else self.rotation

    def _gathered(self, op: Any, layer: int) -> LayerStep:
        row = self.row_of(layer)
        length, last = op.Gather(self.inputs.cache_lengths, row), op.Gather(self.last_index, row)
        total = None if self.total_length is None else op.Gather(self.total_length, row)
        return LayerStep(
            position_ids=self.inputs.position_ids,
            rotation=self._rotation_of(layer),
            cache_length=length,
            last_index=last,
            total_length=total,
        )


def attention_bias(
    op: Any, architecture: Architecture, layer: int, position_ids: ir.Value, key_positions: ir.Value
) -> ir.Value | None:
    """Return the bias that ALiBi and the layer's window add to the scores; None if the layer has neither.

    Args:
        position_ids: int64 [B, S], the positions of the queries.
        key_positions: int64 [B or 1, T], the positions of the keys.

    Returns:
        float32 [B or 1, 1 or heads, S, T].
    """
    if not architecture.needs_key_positions(layer):
        return None
    window = architecture.windows[layer]
    distance = op.Sub(op.Unsqueeze(key_positions, [1]), op.Unsqueeze(position_ids, [2]))
    terms = []
    if window is not None:
        terms.append(op.Unsqueeze(op.Where(op.Greater(distance, -window), 0.0, _MASKED), [1]))
    if isinstance(architecture.positions, Alibi):
        slopes = op.Constant(value=ir.tensor(architecture.positions.slopes()[:, None, None]))
        terms.append(op.Mul(op.Cast(op.Unsqueeze(distance, [1]), to=FLOAT), slopes))
    bias: ir.Value = reduce(op.Add, terms)
    return bias


def inverse_frequencies(op: Any, architecture: Architecture, *, sliding: bool = False) -> Frequencies | None:
    """Return the constants of rotary angles, or with ``sliding`` those of layers with a window; None without any."""
    positions = architecture.sliding_positions if sliding else architecture.positions
    if not isinstance(positions, Rotary):
        return None
    values = np.asarray(positions.inverse_frequencies, dtype=np.float32)
    name = "sliding_inverse_frequencies" if sliding else "inverse_frequencies"
    return Frequencies(op.initializer(ir.tensor(values), name), positions.attention_factor)


def rotation(
    op: Any, frequencies: Frequencies | None, positions: ir.Value, *, of_every_position: bool = False
) -> Rotation | None:
    """Return the angles of positions int64 [max_length] or [B, S]; None without rotary positions.

    The graph computes them: ONNX Runtime folds the angles of every position into a table when it loads the graph.
    """
    if frequencies is None:
        return None
    angles = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=FLOAT), frequencies.inverse)
    cos, sin = op.Cos(angles), op.Sin(angles)
    if frequencies.factor != 1.0:
        cos, sin = op.Mul(cos, frequencies.factor), op.Mul(sin, frequencies.factor)
    return Rotation(cos, sin, of_every_position)
