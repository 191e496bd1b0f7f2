"""Mixtures of experts in an engine's operators, and the storage of experts.

Why these operators: docs/architecture.md, "Mixtures of experts".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Experts
from dynexport.exporter.lowering.block_products import ACCURACY_LEVEL, MICROSOFT
from dynexport.exporter.lowering.storage import Array, BlockQuantized, Stacked, Storage, StoredWeight

# The integers of 8 bits, and how many blocks of a matrix show whether all of them are integers times a scale.
_LARGEST, _LEAST = 127, -128
_SAMPLE = 256


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of all experts of a layer; rows of gate and up take turns in ``gate_up``.

    Attributes:
        gate_up: [2 * channels, hidden] of each expert, stacked.
        down: [hidden, channels] of each expert, stacked.
        gate_up_bias: float [experts, 2 * channels], or None.
        down_bias: float [experts, hidden], or None.
    """

    gate_up: StoredWeight
    down: StoredWeight
    gate_up_bias: ir.Value | None
    down_bias: ir.Value | None


@dataclass(frozen=True)
class ExpertBlocks(Storage):
    """Storage of an expert's matrix as ``BlockQuantized``, with the bytes of a row side by side (layout of QMoE).

    In 8 bits, a matrix whose blocks of 32 are integers times a scale keeps its values: Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS
    and MXFP4.
    """

    single: BlockQuantized

    def holds(self, weight: Array, values: dict[str, Array]) -> bool:
        """Return whether packed values of 8 bits are the weight's own, bit by bit."""
        integers = values["_quantized"].reshape(-1, self.single.block_size).astype(np.float32) + _LEAST
        scaled = integers * values["_scales"].reshape(-1, 1)
        return bool(np.array_equal(scaled.reshape(weight.shape), weight))

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        parts = self.single.parameters(shape)
        quantized = parts["_quantized"]
        assert quantized.shape is not None
        rows, blocks, size = quantized.shape.numpy()
        quantized.shape = ir.Shape([rows, blocks * size])
        return parts

    def pack(self, weight: Array) -> dict[str, Array]:
        values = _kept(weight, self.single.block_size) if self.single.bits == 8 else None
        values = self.single.pack(weight) if values is None else values
        return {**values, "_quantized": values["_quantized"].reshape(len(weight), -1)}


def _kept(weight: Array, block_size: int) -> dict[str, Array] | None:
    """Return 8-bit integers with scales that have the weight's values, else None.

    Values that a GGUF or MXFP4 stored in blocks without minima are such: integers times the scale of their block.
    """
    blocks = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, block_size)
    some = blocks[:: max(1, len(blocks) // _SAMPLE)]
    seen = _scales(some, range(1, -_LEAST + 1))
    if not seen.all():
        return None
    largest, often = np.unique(np.rint(np.abs(some).max(axis=1) / seen).astype(int), return_counts=True)
    likely = largest[np.argsort(-often)].tolist()
    scales = _scales(
        blocks, [*filter(None, likely), *(count for count in range(1, -_LEAST + 1) if count not in likely)]
    )
    if not scales.all():
        return None
    integers = np.rint(blocks / scales[:, None])
    return {
        "_quantized": (integers - _LEAST).astype(np.uint8).reshape(weight.shape),
        "_scales": scales.reshape(len(weight), -1),
    }


def _scales(blocks: Array, counts: Iterable[int]) -> Array:
    """Return a scale for each block that its values are integers of, the largest being one of ``counts``; else 0."""
    largest = np.abs(blocks).max(axis=1)
    scales = (largest == 0).astype(np.float32)
    for count in counts:
        left = np.flatnonzero(scales == 0)
        if not left.size:
            break
        tried = largest[left] / np.float32(count)
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale below the smallest number
            integers = np.rint(blocks[left] / tried[:, None])
            same = (integers * tried[:, None] == blocks[left]) & (integers <= _LARGEST)
        fits = same.all(axis=1)
        scales[left[fits]] = tried[fits]
    return scales


def by_kernel(op: Any, x: ir.Value, scores: ir.Value, weights: ExpertWeights, experts: Experts) -> ir.Value:
    """Return the experts' output by ONNX Runtime's MoE or QMoE, which read the weights of chosen experts alone."""
    attributes: dict[str, Any] = {
        "k": experts.chosen,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # rows of gate and up take turns
        "activation_alpha": experts.alpha,
        "activation_beta": experts.beta,
        "normalize_routing_weights": int(experts.normalised),
    }
    if experts.limit is not None:
        attributes["swiglu_limit"] = experts.limit
    by_token = op.Reshape(scores, [-1, experts.count])
    storage = weights.gate_up.storage
    assert isinstance(storage, Stacked)
    if not isinstance(storage.single, ExpertBlocks):
        gate_up, down = weights.gate_up.parts[""], weights.down.parts[""]
        biased = (gate_up, weights.gate_up_bias, down, weights.down_bias)
        return op.MoE(x, by_token, *_without_end(biased), _domain=MICROSOFT, **attributes)
    inputs: list[ir.Value | None] = []
    for weight, bias in ((weights.gate_up, weights.gate_up_bias), (weights.down, weights.down_bias)):
        inputs += [weight.parts["_quantized"], weight.parts["_scales"], bias]
    zeros = [weight.parts.get("_zero_points") for weight in (weights.gate_up, weights.down)]
    # Without shares of its own QMoE divides by their sum, whatever it is told.
    shares = None if experts.normalised else op.Softmax(by_token, axis=-1)
    return op.QMoE(
        x,
        by_token,
        *_without_end([*inputs, None, None, None, *zeros, None, shares]),
        _domain=MICROSOFT,
        expert_weight_bits=storage.single.single.bits,
        block_size=storage.single.single.block_size,
        accuracy_level=ACCURACY_LEVEL,
        **attributes,
    )


def _without_end(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Return the inputs up to the last one that there is."""
    found = list(inputs)
    while found[-1] is None:
        found.pop()
    return found


def all_experts(op: Any, x: ir.Value, scores: ir.Value, weights: ExpertWeights, experts: Experts) -> ir.Value:
    """Return the experts' output by standard operators: all experts run, and those not chosen count nothing."""
    shape = op.Shape(x)
    tokens = op.Reshape(x, [-1, weights.down.shape[0]])
    shares = _shares(op, op.Reshape(scores, [-1, experts.count]), experts)
    both = op.MatMul(op.Unsqueeze(tokens, [0]), op.Transpose(weights.gate_up.parts[""], perm=[0, 2, 1]))
    if weights.gate_up_bias is not None:
        both = op.Add(both, op.Unsqueeze(weights.gate_up_bias, [1]))
    pairs = op.Reshape(both, [0, 0, experts.intermediate_size, 2])
    gate, up = op.Split(pairs, axis=-1, num_outputs=2, _outputs=2)
    if experts.limit is not None:
        gate = op.Min(gate, _number(op, experts.limit, x))
        up = op.Max(op.Min(up, _number(op, experts.limit, x)), _number(op, -experts.limit, x))
    inner = op.Mul(op.Swish(gate, alpha=experts.alpha), op.Add(up, _number(op, experts.beta, x)))
    y = op.MatMul(op.Squeeze(inner, [-1]), op.Transpose(weights.down.parts[""], perm=[0, 2, 1]))
    if weights.down_bias is not None:
        y = op.Add(y, op.Unsqueeze(weights.down_bias, [1]))
    weighted = op.Mul(op.Cast(y, to=ir.DataType.FLOAT), op.Unsqueeze(op.Transpose(shares, perm=[1, 0]), [-1]))
    summed = op.Cast(op.ReduceSum(weighted, [0], keepdims=0), to=x.dtype)
    found: ir.Value = op.Reshape(summed, shape)
    found.type, found.shape = x.type, x.shape
    return found


def _shares(op: Any, scores: ir.Value, experts: Experts) -> ir.Value:
    """Return each expert's share in a token's output, float32 [tokens, experts]; 0 for those that are not chosen."""
    values, places = op.TopK(op.Softmax(scores, axis=-1), [experts.chosen], axis=-1, _outputs=2)
    if experts.normalised:
        values = op.Div(values, op.ReduceSum(values, [-1]))
    return op.ScatterElements(op.Mul(scores, 0.0), places, values, axis=-1)


def _number(op: Any, value: float, like: ir.Value) -> ir.Value:
    assert like.dtype is not None
    made: ir.Value = op.Constant(value=ir.tensor(np.asarray(value, like.dtype.numpy()), dtype=like.dtype))
    return made


__all__ = ["ExpertBlocks", "ExpertWeights", "all_experts", "by_kernel"]
