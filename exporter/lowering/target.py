"""The interface that each engine implements to lower the graph's modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Activation, Architecture, Experts
from dynexport.exporter.lowering.experts import ExpertWeights, all_experts
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.storage import Plain, Storage, StoredWeight
from dynexport.plugins.route_bodies import gather_tokens
from dynexport.runtime.bundle.manifest import Precision, Profile, TargetName


class BrokenGraph(AssertionError):
    """A bug of the exporter, found in a graph before it is written."""


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of attention over a cache in one layer, for S new tokens per row.

    Queries, keys, values and caches have the target's type of activations, here called float.

    Attributes:
        query: float [B, S, heads * head_dim]; or query, key and value packed along the last axis.
        key: float [B, S, kv_heads * head_dim]; None where it is packed.
        value: float [B, S, kv_heads * head_dim]; None where it is packed.
        past_key: float [B, kv_heads, M, cache_head_dim]; a row's entries are at 0..cache_length-1.
        past_value: float [B, kv_heads, M, cache_head_dim]; a row's entries are at 0..cache_length-1.
        cache_length: int64 [B], number of a row's entries before the append.
        last_index: int32 [B], index of the row's last entry after the append: cache_length + S - 1.
        total_length: int32 scalar, the longest row's number of entries after the append; None where caches have a
            fixed number of slots, and attention covers all slots.
        bias: float32 [B or 1, heads or 1, S, total_length or M], added to the scores; or None.
        rotary: cos and sin float32 [max_length, rotary dim / 2] and position_ids int64 [B, S], consecutive in a row, to
            rotate query and key with; None where both are already rotated, or the model has no rotary positions.
        counts: int64 [B], number of the S tokens that make an entry, where one call appends to a cache several times;
            None where it appends once, and the slots behind the entries may hold any values.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: channels per head of queries, keys and values; caches may have more.
        scale: factor of the scores.
        softcap: bound c of the scores, c * tanh(score / c); None without one.
        sinks: float32 [heads], a score of each head beside those of the keys, without a value; None without one.
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
    sinks: ir.Value | None = None


class Target(ABC):
    """An engine that primitives are lowered to; ``op`` is the builder of the graph or subgraph being written.

    Attributes:
        name: the engine's name in the manifest.
        title: the engine's name in messages and docs.
        precision: storage precision of the weights.
        opset_imports: opset version by operator domain.
        activations: type of hidden states, caches and products; statistics, routers and logits are float32.
        vector_storage: storage of the biases of projections.
        norm_storage: storage of the weights and biases of norms.
        fixed_slots: whether a cache's number of slots is a constant of the graph.
        conditional_layers: whether a layer with its attention may be inside an ``If``.
        plugins: whether graphs may use dynexport's custom operators; ``add_rows`` requires them.
        selects_weights: whether a graph may take the weights of layers that are chosen in the run.
        routes_at_once: whether graphs may use dynexport's CPU operators of routed layers.
        attends_ragged: whether ``attention`` takes several tokens of several rows over caches that hold entries.
        top_k_limit: largest k of ``top_k`` per row; None: no limit.
        appends_once: whether a call may append to a cache only once.
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
    selects_weights: bool = False
    routes_at_once: bool = False
    attends_ragged: bool = False
    top_k_limit: int | None = None
    appends_once: bool = False
    shares_of_batches: bool = True

    @property
    def cache_dtype(self) -> ir.DataType:
        """The type of keys and values in caches; by default that of activations."""
        return self.activations

    def longest_prompt(self, max_length: int) -> int:
        """Return the most prompt tokens per row in one call; by default the whole context of ``max_length``.

        Raises:
            DynexportError: when the target's setting exceeds the context.
        """
        return max_length

    def profiles(self, plan: GraphPlan, max_length: int) -> tuple[Profile, ...]:
        """Return the optimization profiles of a graph's engine; none by default, where any size is accepted."""
        return ()

    def finish(self, model: ir.Model) -> None:  # noqa: B027
        """Complete and check a finished graph.

        Raises:
            BrokenGraph: when the engine would refuse it.
        """

    def bits_read(self, dtype: ir.DataType) -> int:
        """Return the bits that a call reads per element of a stored weight."""
        return dtype.bitwidth

    @abstractmethod
    def weight_storage(self, shape: Sequence[int]) -> Storage:
        """Return the storage of a projection of this shape."""

    def head_storage(self, shape: Sequence[int]) -> Storage:
        """Return the storage of a head of its own of this shape; by default that of a projection."""
        return self.weight_storage(shape)

    @abstractmethod
    def expert_storage(self, columns: Sequence[int]) -> Storage:
        """Return the storage of an expert's matrices, whose rows have these lengths; all of a layer are stacked.

        Raises:
            DynexportError: when the target has no product of experts in its precision.
        """

    def named_storage(self, name: str, weight: StoredWeight) -> Storage:
        """Return the storage of a weight once its name is known; by default the one chosen by its shape."""
        return weight.storage

    @abstractmethod
    def embedding_storage(self, shape: Sequence[int], *, tied: bool) -> Storage:
        """Return the storage of an embedding table; ``tied`` when the head multiplies by it too."""

    @abstractmethod
    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """Multiply x [..., K] by W^T, for W [N, K]."""

    def vector(self, op: Any, stored: ir.Value) -> ir.Value:
        """Return a bias ready to be added to [.., features]; by default as it is stored."""
        return stored

    @abstractmethod
    def gather_rows(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """Gather the rows of W [N, K] at indices int64 [...]: [..., K]."""

    @abstractmethod
    def norm(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        """Apply RMSNorm, or LayerNorm if there is a bias, over the last axis in float32."""

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
        """Return (norm(residual + x), residual + x)."""

    @abstractmethod
    def activate(self, op: Any, x: ir.Value, activation: Activation) -> ir.Value:
        """Apply the activation function to every element."""

    def experts(self, op: Any, x: ir.Value, scores: ir.Value, weights: ExpertWeights, experts: Experts) -> ir.Value:
        """Return the sum of the outputs of each token's experts, shaped like x.

        Args:
            op: builder of the graph.
            x: float [.., hidden].
            scores: float32 [.., experts], the router's.
            weights: the weights of all experts of the layer.
            experts: how many are chosen, and what an expert computes.
        """
        return all_experts(op, x, scores, weights, experts)

    def cache_head_dim(self, head_dim: int) -> int:
        """Return the channels per head in a cache; by default the model's ``head_dim``."""
        return head_dim

    @abstractmethod
    def rotates_in_attention(self, architecture: Architecture) -> bool:
        """Return whether ``attention`` takes rotary tables instead of rotated queries and keys."""

    @abstractmethod
    def attention(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Append key and value and attend causally.

        Returns:
            The output float [B, S, heads * head_dim], present_key and present_value.
        """

    def attention_of_one(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend for one new token per row without appending it.

        Returns:
            The output float [B, 1, heads * head_dim], and the key and value entries for ``append``.
        """
        raise NotImplementedError

    def append(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        """Append new entries float [B, S, kv_heads * head_dim] to a cache and return the cache."""
        raise NotImplementedError

    def append_positions(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        """Append positions int64 [B, S] to those of a cache, int64 [B, M], and return these."""
        return op.TensorScatter(past, new, cache_length, axis=1)

    def top_k(self, op: Any, scores: ir.Value, counts: ir.Value, most: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Choose the counts[b] largest scores of each row; among equal scores, the lowest index comes first.

        Args:
            op: builder of the graph.
            scores: float32 [B, S].
            counts: int64 [B], at most ``most``.
            most: int64 [1], K.

        Returns:
            Token indices int64 [B, K], distinct within a row, and int64 [B, K], 1 for a chosen token and 0 otherwise.
        """
        _, places = op.TopK(scores, most, axis=1, sorted=1, _outputs=2)
        ranks = op.Range(0, op.Squeeze(most, [0]), 1)
        return places, op.Cast(op.Less(ranks, op.Unsqueeze(counts, [1])), to=ir.DataType.INT64)

    def gather_tokens(self, op: Any, x: ir.Value, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the tokens [N, hidden] of x [B, S, hidden] chosen by bool [1, B, S], and their places int64 [N, 2]."""
        return gather_tokens(op, x, chosen)

    def add_rows(
        self, op: Any, x: ir.Value, rows: ir.Value, gate: ir.Value, places: ir.Value, valid: ir.Value
    ) -> ir.Value:
        """Add gate * rows to x at the given token indices.

        Args:
            op: builder of the graph.
            x: float [B, S, hidden].
            rows: float [B, K, hidden].
            gate: float32 [B, K].
            places: int64 [B, K], token indices, distinct within a row.
            valid: int32 [B, K], 0 for an entry that is not added.
        """
        raise NotImplementedError


def cast(op: Any, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Cast a value to a type; a value that already has the type is returned as it is."""
    return value if value.dtype == dtype else op.Cast(value, to=dtype)
