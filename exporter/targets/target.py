"""What an engine has to offer for the modules of the graph to be lowered to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dynexport.exporter.architecture import Activation, Architecture
from dynexport.exporter.graph.storage import Storage, StoredWeight


@dataclass(frozen=True)
class AttentionInputs:
    """What attention over a cache needs in one layer; S new tokens after the cached ones.

    Attributes:
        query: float32 [B, S, heads * head_dim]; or query, key and value packed along the last axis.
        key, value: float32 [B, S, kv_heads * head_dim]; None where they are packed.
        past_key, past_value: float32 [B, kv_heads, M, head_dim], entries 0..cache_length-1 of a row in use.
        last_index: int32 [B], index of the row's last entry after the append: cache_length + S - 1.
        total_length: int32 scalar, the longest row's entries after the append.
        bias: float32 [B or 1, heads or 1, S, total_length] added to the scores, or None.
        rotary: cos and sin float32 [max_length, rotary dim / 2] and position_ids int64 [B, S], consecutive in a row,
            to rotate query and key by; None where they are as they should be.
    """

    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    past_key: ir.Value
    past_value: ir.Value
    last_index: ir.Value
    total_length: ir.Value
    bias: ir.Value | None
    rotary: tuple[ir.Value, ir.Value, ir.Value] | None = None


class Target(ABC):
    """Lowers primitives; ``op`` is the builder of the graph or subgraph that is being written."""

    opset_imports: Mapping[str, int]

    @abstractmethod
    def weight_storage(self, shape: Sequence[int]) -> Storage:
        """How a projection of this shape is stored."""

    @abstractmethod
    def embedding_storage(self, shape: Sequence[int], *, tied: bool) -> Storage:
        """How an embedding table is stored; ``tied`` when the head multiplies by it too."""

    @abstractmethod
    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """x [..., K] times W^T for W [N, K]."""

    @abstractmethod
    def gather_rows(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """Rows of W, float32."""

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

    @abstractmethod
    def rotates_in_attention(self, architecture: Architecture) -> bool:
        """Whether ``attention`` can be given rotary tables instead of rotated queries and keys."""

    @abstractmethod
    def attention(
        self,
        op: Any,
        inputs: AttentionInputs,
        *,
        heads: int,
        kv_heads: int,
        scale: float,
        softcap: float | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Append key and value, attend causally: (output [B, S, heads * head_dim], present_key, present_value)."""
