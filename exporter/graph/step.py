"""The inputs of one step - S new tokens per row on top of what is cached - and what all layers derive from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Alibi, Architecture, Rotary
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target

INT64, INT32, BOOL, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT
# Added to the score of a key outside the window: exp() of it is 0, and no sum of it overflows.
_MASKED = -1e30


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache, as input or output: key and value [B, kv_heads, M, cache_head_dim].

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
class Frequencies:
    """What rotary angles are computed with.

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
        cos, sin: float32 [max_length, rotary dim / 2] of every position, for an attention kernel that rotates itself;
            or [B, S, rotary dim / 2] of the step's tokens.
        of_every_position: which of the two.
    """

    cos: ir.Value
    sin: ir.Value
    of_every_position: bool


@dataclass(frozen=True)
class StepInputs:
    """The inputs that every graph of a whole step has.

    Attributes:
        input_ids, position_ids: int64 [B, S].
        cache_lengths: int64 [L, B].
        layer_active: bool [L], in a graph that can skip layers.
        logits_indices: int64 [B, K].
        frequencies: what rotary angles are computed with, or None.
    """

    input_ids: ir.Value
    position_ids: ir.Value
    cache_lengths: ir.Value
    layer_active: ir.Value | None
    logits_indices: ir.Value
    frequencies: Frequencies | None


class Line(Protocol):
    """Tokens of all rows in one line, N of them; attention wants them as rows of C places each."""

    def to_rows(self, op: Any, x: ir.Value) -> ir.Value:
        """[N, features] -> [B, C, features]."""

    def to_line(self, op: Any, x: ir.Value, features: int) -> ir.Value:
        """[B, C, features] -> [N, features]."""


@dataclass(frozen=True)
class LayerStep:
    """What one layer has to know of the S tokens that run in it (of a routed layer: those that it runs).

    Attributes:
        position_ids: int64 [B, S], their original positions; None where nothing asks for them.
        rotation: rotary angles, or None.
        cache_length: int64 [B], entries in the layer's cache before the step.
        last_index: int32 [B], cache_length + S - 1.
        total_length: int32 scalar, the longest row's entries after the step; None where caches have a fixed number of
            slots, and attention looks at all of them.
        bias: what windows and ALiBi add to the scores where that is known beforehand, float32 [B or 1, 1 or heads,
            S, total_length or M]; where it is not, it follows from the positions in the cache.
        counts: int64 [B], how many of the S tokens make an entry, where steps of one run append to the same cache; None
            where a run appends to it once, and what is no token's stands behind all entries.
        append_later: every row has one token, whose entry attention gives instead of the cache, to be appended outside.
        ragged: where the layer's tokens come in one line, how they become the rows that attention wants.
    """

    position_ids: ir.Value | None
    rotation: Rotation | None
    cache_length: ir.Value
    last_index: ir.Value
    total_length: ir.Value | None
    bias: ir.Value | None = None
    ragged: Line | None = None
    counts: ir.Value | None = None
    append_later: bool = False


@dataclass(frozen=True)
class Step:
    """The inputs of a step that all layers share; ``for_layer`` makes of them what one layer has to know.

    Attributes:
        inputs: of the graph.
        layers: the layers of the graph: the rows of cache_lengths, layer_active, last_index and total_length.
        rotation: rotary angles, or None.
        last_index: int32 [L, B], cache_lengths + S - 1.
        total_length: int32 [L], the longest row's entries after the step; None where caches have a fixed number of
            slots, ``max_length`` of unrouted layers.
        contiguous: layers whose caches hold exactly the positions 0, 1, 2, ..: nothing ever skips them.
        alike: by window, for contiguous layers: they differ in nothing else, and what they have to know is computed
            once.
        together: by layer, for those whose caches have the same lengths as others': these know the same.
    """

    architecture: Architecture
    inputs: StepInputs
    layers: tuple[int, ...]
    rotation: Rotation | None
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
        """Compute what contiguous layers have to know once for each window; total is int64 [L], or None."""
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
        """The layer's row."""
        return self.layers.index(layer)

    def for_layer(self, op: Any, layer: int) -> LayerStep:
        """What a layer that runs all tokens has to know."""
        if layer in self.contiguous:
            return self.alike[self.architecture.windows[layer]]
        return self.together.get(layer) or self._gathered(op, layer)

    def _gathered(self, op: Any, layer: int) -> LayerStep:
        row = self.row_of(layer)
        length, last = op.Gather(self.inputs.cache_lengths, row), op.Gather(self.last_index, row)
        total = None if self.total_length is None else op.Gather(self.total_length, row)
        return LayerStep(
            position_ids=self.inputs.position_ids,
            rotation=self.rotation,
            cache_length=length,
            last_index=last,
            total_length=total,
        )


def attention_bias(
    op: Any, architecture: Architecture, layer: int, position_ids: ir.Value, key_positions: ir.Value
) -> ir.Value | None:
    """What ALiBi and the layer's window add to the scores; None where it has neither.

    Args:
        position_ids: int64 [B, S], of the queries.
        key_positions: int64 [B or 1, T].

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


def inverse_frequencies(op: Any, architecture: Architecture) -> Frequencies | None:
    """What angles are computed with; None without rotary positions."""
    positions = architecture.positions
    if not isinstance(positions, Rotary):
        return None
    values = np.asarray(positions.inverse_frequencies, dtype=np.float32)
    return Frequencies(op.initializer(ir.tensor(values), "inverse_frequencies"), positions.attention_factor)


def rotation(
    op: Any, frequencies: Frequencies | None, positions: ir.Value, *, of_every_position: bool = False
) -> Rotation | None:
    """The angles of positions int64 [max_length] or [B, S]; None without rotary positions.

    Computed, not stored: ONNX Runtime folds those of every position into a table when it loads the graph.
    """
    if frequencies is None:
        return None
    angles = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=FLOAT), frequencies.inverse)
    cos, sin = op.Cos(angles), op.Sin(angles)
    if frequencies.factor != 1.0:
        cos, sin = op.Mul(cos, frequencies.factor), op.Mul(sin, frequencies.factor)
    return Rotation(cos, sin, of_every_position)
