"""Lowering for TensorRT: strongly typed operators of opset 24, over fixed-size caches that TensorScatter updates.

The same file runs on ONNX Runtime. Why these operators: docs/tensorrt.md, "The lowering".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Activation, Architecture
from dynexport.exporter.lowering.plan import Dimension, GraphPlan
from dynexport.exporter.lowering.storage import Dequantized, Plain, Storage, StoredWeight
from dynexport.exporter.lowering.target import AttentionInputs, Target, cast
from dynexport.exporter.lowering.tensorrt.rules import check_accepted
from dynexport.plugins.graph import add_functions, capacity_top_k, gated_scatter_add, ragged_kv_append
from dynexport.runtime.bundle.checks import is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Precision, Profile, TargetName

OPSET = 24
MAX_BATCH, MAX_PROMPT = 8, 1024
_MOST_ROWS = 1 << 16
# Largest k of TensorRT's TopK.
TOP_K_LIMIT = 3840
# Most logits per row in one prefill call: each takes float32 [vocabulary] for every batch row.
_LOGITS = 16
# Block sizes of int4; the largest that divides a row is used.
_BLOCK_SIZES = (128, 64, 32)
# Added to the score of a masked entry. It is finite in float16, and so is its sum with any score.
_HIDDEN = -3e4
_ACTIVATIONS: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.FLOAT16,
    "int4": ir.DataType.FLOAT16,
}


class TensorRT(Target):
    """The TensorRT target: products, hidden states and caches in the precision's type, the rest in float32.

    Statistics, routers and logits are float32.

    Args:
        precision: fp32, fp16 or bf16; or int8 or int4 for the weights, with fp16 activations.
        max_batch: most batch rows of an engine.
        max_prompt: most prompt tokens per row in one call; None: the context, at most ``MAX_PROMPT``.
        plugins: use dynexport's custom operators (docs/plugins.md) where those of TensorRT have limits.
    """

    name: TargetName = "tensorrt"
    title = "TensorRT"
    opset_imports: Mapping[str, int] = {"": OPSET}
    fixed_slots = True
    conditional_layers = False

    def __init__(
        self, precision: Precision, max_batch: int = MAX_BATCH, max_prompt: int | None = None, *, plugins: bool = False
    ) -> None:
        if not is_integer(max_batch) or max_batch < 1:
            raise DynexportError(f"max_batch: expected at least 1 row, found {shown(max_batch)}")
        if max_batch > _MOST_ROWS:
            raise DynexportError(f"max_batch: expected at most {_MOST_ROWS} rows, found {max_batch}")
        self.precision, self.max_batch, self.max_prompt, self.plugins = precision, max_batch, max_prompt, plugins
        self.activations = _ACTIVATIONS[precision]
        self.vector_storage: Storage = Plain(self.activations)
        self.top_k_limit = None if plugins else TOP_K_LIMIT
        self.selects_weights = plugins
        self.appends_once, self.shares_of_batches = not plugins, max_batch == 1

    # Optimization profiles

    def longest_prompt(self, max_length: int) -> int:
        if self.max_prompt is None:
            return min(MAX_PROMPT, max_length)
        if not is_integer(self.max_prompt) or not 1 <= self.max_prompt <= max_length:
            raise DynexportError(
                f"max_prompt: expected 1..{max_length} tokens, the context (--max-length), found "
                f"{shown(self.max_prompt)}"
            )
        return self.max_prompt

    def profiles(self, plan: GraphPlan, max_length: int) -> tuple[Profile, ...]:
        prompt = self.longest_prompt(max_length)
        if plan.chunk is not None:
            prompt = min(prompt, plan.chunk)
        return tuple(
            Profile(name=name, ranges=self._ranges(plan, prompt if name == "prefill" else 1)) for name in plan.serves
        )

    def _ranges(self, plan: GraphPlan, tokens: int) -> dict[str, tuple[int, int, int]]:
        """Return (min, opt, max) of every dimension, for calls of at most ``tokens`` tokens per row."""
        rows, logits = self.max_batch, tokens if plan.whole_prompts else min(tokens, _LOGITS)
        ranges: dict[Dimension, tuple[int, int, int]] = {
            "rows": (1, 1, rows),
            "tokens": (1, tokens, tokens),
            "logits": (1, 1, logits),
            "line": (1, tokens, rows * tokens),
            "line_of_logits": (1, 1, max(rows, logits)),
        }
        return {symbol: ranges[counted] for symbol, counted in plan.dimensions.items()}

    def finish(self, model: ir.Model) -> None:
        check_accepted(model.graph)
        if self.plugins:
            add_functions(model)

    # Weights

    def weight_storage(self, shape: Sequence[int]) -> Storage:
        if self.precision == "int8":
            return Dequantized(8, self.activations)
        block = next((size for size in _BLOCK_SIZES if shape[1] % size == 0), None)
        if self.precision == "int4" and block is not None:
            return Dequantized(4, self.activations, block)
        return Plain(self.activations)

    def expert_storage(self, columns: Sequence[int]) -> Storage:
        if self.precision in ("int8", "int4"):
            raise DynexportError(
                f"precision: expected fp32, fp16 or bf16 for a mixture of experts on TensorRT, found {self.precision}"
            )
        return Plain(self.activations)

    def embedding_storage(self, shape: Sequence[int], *, tied: bool) -> Storage:
        return Plain(self.activations)

    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """Multiply in the weight's type; a router's is float32 for any type of hidden states."""
        storage = weight.storage
        if isinstance(storage, Dequantized):
            parts = (weight.parts["_quantized"], weight.parts["_scales"])
            blocks = {} if storage.block_size is None else {"block_size": storage.block_size}
            factor = op.DequantizeLinear(*parts, axis=storage.axis, **blocks)
            factor.type = ir.TensorType(storage.dtype)
            factor.shape = ir.Shape(weight.shape[::-1])
        else:
            factor = op.Transpose(weight.parts[""], perm=[1, 0])
        return op.MatMul(cast(op, x, factor.dtype), factor)

    def gather_rows(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        return op.Gather(weight.parts[""], indices)

    # Elementwise operators and norms

    def norm(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        """Normalise in float32 and return the type of x; a router's input stays float32."""
        wide = cast(op, x, ir.DataType.FLOAT)
        if bias is None:
            normed = op.RMSNormalization(wide, weight, axis=-1, epsilon=epsilon)
        else:
            normed = op.LayerNormalization(wide, weight, bias, axis=-1, epsilon=epsilon)
        return cast(op, normed, x.dtype)

    def add_norm(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        epsilon: float,
    ) -> tuple[ir.Value, ir.Value]:
        total = op.Add(residual, x)
        return self.norm(op, total, weight, bias, epsilon), total

    def activate(self, op: Any, x: ir.Value, activation: Activation) -> ir.Value:
        if activation == "silu":
            return op.Swish(x)
        if activation == "relu":
            return op.Relu(x)
        if activation == "relu2":
            positive = op.Relu(x)
            return op.Mul(positive, positive)
        return op.Gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")

    def rotates_in_attention(self, architecture: Architecture) -> bool:
        return False

    def top_k(self, op: Any, scores: ir.Value, counts: ir.Value, most: ir.Value) -> tuple[ir.Value, ir.Value]:
        if not self.plugins:
            return super().top_k(op, scores, counts, most)
        places, runs = capacity_top_k(op, scores, counts, op.Range(0, op.Squeeze(most, [0]), 1))
        return places, op.Cast(runs, to=ir.DataType.INT64)

    def add_rows(
        self, op: Any, x: ir.Value, rows: ir.Value, gate: ir.Value, places: ir.Value, valid: ir.Value
    ) -> ir.Value:
        return gated_scatter_add(op, x, rows, cast(op, gate, self.activations), places, valid)

    # Attention

    def attention(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        query, key, value = _apart(op, inputs)
        query = _by_head(op, query, inputs.past_key, inputs.heads)
        present_key, present_value = (
            self._appended(op, past, new, inputs) for past, new in ((inputs.past_key, key), (inputs.past_value, value))
        )
        seen = _seen(op, query, inputs)
        if inputs.softcap is None and inputs.sinks is None:
            mask = seen if inputs.bias is None else cast(op, _added(op, seen, inputs.bias), self.activations)
            found = op.Attention(query, present_key, present_value, mask, scale=inputs.scale)
        else:
            scores = _scores(op, query, present_key, inputs)
            hidden = _added(op, seen, inputs.bias)
            found = _weighted(op, _chances(op, op.Add(scores, hidden), inputs.sinks), present_value)
        return _side_by_side(op, found, inputs.heads), present_key, present_value

    def attention_of_one(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend to the cache and to the token's own entry, written out in single operators.

        TensorRT allows neither Attention nor an append to a cache inside an ``If``.
        """
        query, key, value = _apart(op, inputs)
        assert inputs.past_key.shape is not None
        _, _, slots, head_dim = inputs.past_key.shape
        query = op.Reshape(query, [0, inputs.heads, 1, head_dim])
        own_key, own_value = (op.Reshape(x, [0, inputs.kv_heads, 1, head_dim]) for x in (key, value))
        seen = op.Less(_slots(op, inputs.past_key), op.Unsqueeze(inputs.cache_length, [1, 2, 3]))
        past = op.Add(_scores(op, query, inputs.past_key, inputs), _added(op, seen, inputs.bias))
        own = _scores(op, query, own_key, inputs)
        chances = _chances(op, op.Concat(past, own, axis=-1), inputs.sinks)
        past, own = op.Split(chances, [slots, 1], axis=-1, _outputs=2)
        found = op.Add(_weighted(op, past, inputs.past_value), _weighted(op, own, own_value))
        return _side_by_side(op, found, inputs.heads), key, value

    def _appended(self, op: Any, past: ir.Value, new: ir.Value, inputs: AttentionInputs) -> ir.Value:
        if inputs.counts is None or not self.plugins:
            return self.append(op, past, new, inputs.cache_length)
        return ragged_kv_append(op, past, _by_head(op, new, past), inputs.cache_length, inputs.counts)

    def append(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        return op.TensorScatter(past, _by_head(op, new, past), cache_length, axis=-2)

    def append_positions(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        """Append positions with GatherElements; TensorRT's TensorScatter takes float tensors of rank 4 only."""
        assert past.shape is not None
        last = op.Sub(op.Shape(new, start=1, end=2), 1)
        place = op.Sub(op.Range(0, past.shape[1], 1), op.Unsqueeze(cache_length, [1]))
        inside = op.Min(op.Max(place, 0), last)
        taken = op.GatherElements(new, inside, axis=1)
        return op.Where(op.Equal(inside, place), taken, past)


def _apart(op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return query, key and value; packed ones are split."""
    if inputs.key is not None and inputs.value is not None:
        return inputs.query, inputs.key, inputs.value
    assert inputs.past_key.shape is not None
    head_dim = inputs.past_key.shape[3]
    sizes = [count * head_dim for count in (inputs.heads, inputs.kv_heads, inputs.kv_heads)]
    query, key, value = op.Split(inputs.query, sizes, axis=-1, _outputs=3)
    return query, key, value


def _by_head(op: Any, x: ir.Value, cache: ir.Value, heads: int | None = None) -> ir.Value:
    """Split heads: [B, S, heads * head_dim] -> [B, heads, S, head_dim]; ``heads`` defaults to the cache's."""
    assert cache.shape is not None
    _, kv_heads, _, head_dim = cache.shape
    split = op.Reshape(x, [0, 0, heads or kv_heads, head_dim])
    return op.Transpose(split, perm=[0, 2, 1, 3])


def _side_by_side(op: Any, x: ir.Value, heads: int) -> ir.Value:
    """Merge heads: [B, heads, S, head_dim] -> [B, S, heads * head_dim]."""
    assert x.shape is not None
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, heads * x.shape[3]])


def _slots(op: Any, cache: ir.Value) -> ir.Value:
    """Return the slot numbers 0, 1, 2, .., int64 [M]."""
    assert cache.shape is not None
    return op.Range(0, cache.shape[2], 1)


def _seen(op: Any, query: ir.Value, inputs: AttentionInputs) -> ir.Value:
    """Return the causal mask, bool [B, 1, S, M]: True where a token attends to an entry."""
    tokens = op.Range(0, op.Squeeze(op.Shape(query, start=2, end=3), [0]), 1)
    own = op.Add(op.Unsqueeze(inputs.cache_length, [1]), tokens)
    return op.LessOrEqual(_slots(op, inputs.past_key), op.Unsqueeze(own, [1, 3]))


def _added(op: Any, seen: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Return the mask and the bias as one float32 term to add to the scores."""
    shown = 0.0 if bias is None else op.Max(bias, _HIDDEN)
    return op.Where(seen, shown, _HIDDEN)


def _chances(op: Any, scores: ir.Value, sinks: ir.Value | None) -> ir.Value:
    """Return the softmax of scores float32 [B, heads, S, M], of which a head's sink takes its part."""
    if sinks is None:
        return op.Softmax(scores, axis=-1)
    most = op.Max(op.ReduceMax(scores, [-1]), op.Unsqueeze(sinks, [1, 2]))
    powers = op.Exp(op.Sub(scores, most))
    own = op.Exp(op.Sub(op.Unsqueeze(sinks, [1, 2]), most))
    return op.Div(powers, op.Add(op.ReduceSum(powers, [-1]), own))


def _scores(op: Any, query: ir.Value, key: ir.Value, inputs: AttentionInputs) -> ir.Value:
    """Return scores float32 [B, heads, S, M] of query [B, heads, S, head_dim] and key [B, kv_heads, M, head_dim]."""
    products = op.MatMul(_by_group(op, query, key), op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = op.Mul(_by_single_head(op, cast(op, products, ir.DataType.FLOAT), query), inputs.scale)
    cap = inputs.softcap
    return scores if cap is None else op.Mul(op.Tanh(op.Div(scores, cap)), cap)


def _weighted(op: Any, chances: ir.Value, value: ir.Value) -> ir.Value:
    """Weight values by probabilities: float32 [B, heads, S, M] and [B, kv_heads, M, head_dim].

    Returns:
        float [B, heads, S, head_dim].
    """
    assert value.dtype is not None
    found = op.MatMul(_by_group(op, cast(op, chances, value.dtype), value), value)
    return _by_single_head(op, found, chances)


def _by_group(op: Any, x: ir.Value, entries: ir.Value) -> ir.Value:
    """Group the heads that share a key: [B, heads, S, n] -> [B, kv_heads, heads / kv_heads * S, n]."""
    assert entries.shape is not None and x.shape is not None
    return op.Reshape(x, [0, entries.shape[1], -1, x.shape[3]])


def _by_single_head(op: Any, x: ir.Value, like: ir.Value) -> ir.Value:
    """Undo ``_by_group``; the number of heads is that of ``like``."""
    assert like.shape is not None and x.shape is not None
    return op.Reshape(x, [0, like.shape[1], -1, x.shape[3]])


__all__ = ["MAX_BATCH", "MAX_PROMPT", "TOP_K_LIMIT", "TensorRT"]
