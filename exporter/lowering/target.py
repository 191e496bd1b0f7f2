"""What an engine has to offer for the modules of the graph to be lowered to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Activation, Architecture
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.storage import Plain, Storage, StoredWeight
from dynexport.runtime.bundle.manifest import Precision, Profile, TargetName


class BrokenGraph(AssertionError):
    """A bug of the exporter, found before the graph is written."""


@dataclass(frozen=True)
class AttentionInputs:
    """What attention over a cache needs in one layer; S new tokens after the cached ones.

    Queries, keys, values and caches have the target's type of activations, here called float.

    Attributes:
        query: float [B, S, heads * head_dim]; or query, key and value packed along the last axis.
        key, value: float [B, S, kv_heads * head_dim]; None where they are packed.
        past_key, past_value: float [B, kv_heads, M, cache_head_dim], entries 0..cache_length-1 of a row in use.
        cache_length: int64 [B], entries of a row before the append.
        last_index: int32 [B], index of the row's last entry after the append: cache_length + S - 1.
        total_length: int32 scalar, the longest row's entries after the append; None where caches have a fixed number
            of slots, and attention looks at all of them.
        bias: float32 [B or 1, heads or 1, S, total_length or M] added to the scores, or None.
        rotary: cos and sin float32 [max_length, rotary dim / 2] and position_ids int64 [B, S], consecutive in a row,
            to rotate query and key by; None where they are as they should be.
        counts: int64 [B], how many of the S tokens make an entry, where a run appends to a cache several times; None
            where it does so once, and may leave what it likes behind the entries.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: channels of a head of queries, keys and values; caches may have more.
        scale: factor of the scores.
        softcap: what they are squeezed into by tanh, or None.
    """

    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    past_key: ir.Value
    past_value: ir.Value
    cache_length: ir.Value
    last_index: ir.Value
    total_length: ir.Value | None
    bias: ir.Value | None
    rotary: tuple[ir.Value, ir.Value, ir.Value] | None
    counts: ir.Value | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None


class Target(ABC):
    """Lowers primitives; ``op`` is the builder of the graph or subgraph that is being written.

    Attributes:
        title: the engine's name as its makers write it.
        precision: how weights are stored.
        activations: type of hidden states, caches and what products give; statistics, routers and logits are float32.
        vector_storage: how the biases of projections are stored.
        norm_storage: how weights and biases of norms are.
        fixed_slots: whether a cache's number of slots stands in the graph.
        conditional_layers: whether a layer with its attention can stand inside an ``If``.
        plugins: whether graphs may call operators of our own; only then is there ``add_rows``.
        top_k_limit: the most that ``top_k`` chooses of a row; None for any number.
        appends_once: whether a run appends to a cache only once.
        shares_of_batches: whether a size can be a share of rows times tokens.
    """

    name: TargetName
    title: str
    precision: Precision
    opset_imports: Mapping[str, int]
    activations: ir.DataType = ir.DataType.FLOAT
    vector_storage: Storage = Plain()
    norm_storage: Storage = Plain()
    fixed_slots: bool = False
    conditional_layers: bool = True
    plugins: bool = False
    top_k_limit: int | None = None
    appends_once: bool = False
    shares_of_batches: bool = True

    def longest_prompt(self, max_length: int) -> int:
        """Tokens of a prompt that a run takes at most in a context of so many; here, all.

        Raises:
            DynexportError: where the target was asked for more than the context.
        """
        return max_length

    def profiles(self, plan: GraphPlan, max_length: int) -> tuple[Profile, ...]:
        """The sizes that a graph's engine is built for; here, a session takes any."""
        return ()

    def finish(self, model: ir.Model) -> None:  # noqa: B027
        """Add what a finished graph needs. Raises BrokenGraph for one that the engine would not take."""

    def bits_read(self, dtype: ir.DataType) -> int:
        """Of a stored weight's element, when a run reads it."""
        return dtype.bitwidth

    @abstractmethod
    def weight_storage(self, shape: Sequence[int]) -> Storage:
        """How a projection of this shape is stored."""

    @abstractmethod
    def embedding_storage(self, shape: Sequence[int], *, tied: bool) -> Storage:
        """How an embedding table is stored; ``tied`` when the head multiplies by it too."""

    @abstractmethod
    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """x [..., K] times W^T for W [N, K]."""

    def vector(self, op: Any, stored: ir.Value) -> ir.Value:
        """A bias as it is added to [.., features]; here, as it is stored."""
        return stored

    @abstractmethod
    def gather_rows(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """Rows of W."""

    @abstractmethod
    def norm(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        """RMSNorm, or LayerNorm when there is a bias, over the last axis in float32."""

    @abstractmethod
    def add_norm(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        epsilon: float,
    ) -> tuple[ir.Value, ir.Value]:
        """(norm(residual + x), residual + x)."""

    @abstractmethod
    def activate(self, op: Any, x: ir.Value, activation: Activation) -> ir.Value:
        """The activation function, element by element."""

    def cache_head_dim(self, head_dim: int) -> int:
        """Channels of a head in a cache; here, as many as the model's heads have."""
        return head_dim

    @abstractmethod
    def rotates_in_attention(self, architecture: Architecture) -> bool:
        """Whether ``attention`` can be given rotary tables instead of rotated queries and keys."""

    @abstractmethod
    def attention(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Append key and value, attend causally: (output [B, S, heads * head_dim], present_key, present_value)."""

    def attention_of_one(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One new token per row, and no append: (output [B, 1, heads * head_dim], the entries for ``append``)."""
        raise NotImplementedError

    def append(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        """Entries float [B, kv_heads, S, head_dim] behind those of a cache."""
        raise NotImplementedError

    def append_positions(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        """Positions int64 [B, S] behind those of a cache, int64 [B, M]."""
        return op.TensorScatter(past, new, cache_length, axis=1)

    def top_k(self, op: Any, scores: ir.Value, counts: ir.Value, most: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Of each row the counts[b] largest scores, the lowest index first among equals.

        Args:
            scores: float32 [B, S].
            counts: int64 [B], at most ``most``.
            most: int64 [1], K.

        Returns:
            Places int64 [B, K], all of a row different; and int64 [B, K], 1 for those that are among the largest.
        """
        _, places = op.TopK(scores, most, axis=1, sorted=1, _outputs=2)
        ranks = op.Range(0, op.Squeeze(most, [0]), 1)
        return places, op.Cast(op.Less(ranks, op.Unsqueeze(counts, [1])), to=ir.DataType.INT64)

    def add_rows(
        self, op: Any, x: ir.Value, rows: ir.Value, gate: ir.Value, places: ir.Value, valid: ir.Value
    ) -> ir.Value:
        """x float [B, S, hidden] with gate * rows added where rows belong.

        Args:
            rows: float [B, K, hidden].
            gate: float32 [B, K].
            places: int64 [B, K], all of a row different.
            valid: int32 [B, K], 0 where nothing is added.
        """
        raise NotImplementedError


def cast(op: Any, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """A value in another type; itself where it has that one."""
    return value if value.dtype == dtype else op.Cast(value, to=dtype)
