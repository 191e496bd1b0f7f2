"""Self-attention over a cache: project, rotate, append, attend, project."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.graph.layers import Linear, Norm, Vector
from dynexport.exporter.graph.step import LayerCache, LayerStep, Line, Rotation, attention_bias
from dynexport.exporter.lowering.target import AttentionInputs, Target, cast


class Attention(nn.Module):
    """The attention of layer ``index``.

    Args:
        apart: whether queries have a projection of their own, and keys and values another, ``q_proj`` and ``kv_proj``;
            ``forward`` is for attention with one projection.
    """

    def __init__(self, target: Target, architecture: Architecture, index: int, *, apart: bool = False) -> None:
        super().__init__()
        a = self.architecture = architecture.of(index)
        self.target, self.index = target, index
        self.query_size, self.kv_size = a.heads * a.head_dim, a.kv_heads * a.head_dim
        projections = {"qkv_proj": a.projected_size}
        if apart:
            projections = {"q_proj": self.query_size, "kv_proj": 2 * self.kv_size}
        for name, size in projections.items():
            setattr(self, name, Linear(target, a.hidden_size, size, bias=a.qkv_bias))
        self.o_proj = Linear(target, self.query_size, a.hidden_size, bias=a.attention_output_bias)
        if a.qk_norm:
            apart = a.qk_norm == "head"
            self.q_norm = Norm(target, "rms", a.head_dim if apart else self.query_size, a.norm_epsilon)
            self.k_norm = Norm(target, "rms", a.head_dim if apart else self.kv_size, a.norm_epsilon)
        if a.sinks:
            self.sinks = Vector(a.heads)

    def forward(
        self, op: Any, hidden_states: ir.Value, step: LayerStep | Line, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Return the output, shaped like hidden_states [B, S, hidden] or [N, hidden], and the cache with the tokens."""
        projected = self.qkv_proj(op, hidden_states)

        def attend(op: Any, projected: ir.Value, step: LayerStep) -> tuple[ir.Value, LayerCache]:
            return self.attend(op, self.prepare(op, projected, step.rotation), step, cache)

        if isinstance(step, LayerStep):
            output, present = attend(op, projected, step)
        else:
            output, present = step.attend(op, projected, attend, cache)
        return self.o_proj(op, output), present

    def prepare(
        self, op: Any, projected: ir.Value, rotation: Rotation | None
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Return query, key and value, normed and rotated; if neither applies, the packed projection, None, None."""
        a = self.architecture
        if not a.qk_norm:
            projected = self._clipped(op, projected)
        rotation = rotation if a.rotary_layers[self.index] else None
        rotate_here = rotation is not None and not rotation.of_every_position
        if not (a.qk_norm or rotate_here):
            return projected, None, None
        query, key, value = self.split(op, projected)
        if a.qk_norm:
            query = self._norm_heads(op, query, self.q_norm, a.heads)
            key = self._norm_heads(op, key, self.k_norm, a.kv_heads)
            query, key, value = (self._clipped(op, part) for part in (query, key, value))
        if rotation is not None and rotate_here:
            query, key = self._rotate(op, query, a.heads, rotation), self._rotate(op, key, a.kv_heads, rotation)
        return query, key, value

    def attend(
        self,
        op: Any,
        prepared: tuple[ir.Value, ir.Value | None, ir.Value | None],
        step: LayerStep,
        cache: LayerCache,
    ) -> tuple[ir.Value, LayerCache]:
        """Append to the cache and attend.

        Returns:
            The output [B, S, heads * head_dim], and the cache with the tokens appended; with ``append_later``, the new
            entries alone.
        """
        a = self.architecture
        position, bias = self._positions(op, step, cache)
        rotation, rotary = step.rotation if a.rotary_layers[self.index] else None, None
        if rotation is not None and rotation.of_every_position and step.position_ids is not None:
            rotary = (rotation.cos, rotation.sin, step.position_ids)
        query, key, value = prepared
        past_key, past_value = cache.entries
        inputs = AttentionInputs(
            query=query,
            key=key,
            value=value,
            past_key=past_key,
            past_value=past_value,
            cache_length=step.cache_length,
            last_index=step.last_index,
            total_length=step.total_length,
            bias=bias,
            rotary=rotary,
            counts=step.counts,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            scale=a.scale,
            softcap=a.attention_softcap,
            sinks=self.sinks.values if a.sinks else None,
        )
        attention = self.target.attention_of_one if step.append_later else self.target.attention
        output, present_key, present_value = attention(op, inputs)
        return output, LayerCache(present_key, present_value, position)

    def entries(self, op: Any, projected: ir.Value, step: LayerStep) -> tuple[ir.Value, ir.Value]:
        """Return key and value, each [B, S, kv_heads * head_dim] as the cache has them, of ``kv_proj``'s result."""
        a = self.architecture
        if a.qkv_clip is not None:
            projected = op.Clip(projected, -a.qkv_clip, a.qkv_clip)
        key, value = op.Split(projected, [self.kv_size, self.kv_size], axis=-1, _outputs=2)
        if a.qk_norm:
            key = self._norm_heads(op, key, self.k_norm, a.kv_heads)
        return self._rotated(op, key, a.kv_heads, step), value

    def query(self, op: Any, projected: ir.Value, step: LayerStep) -> ir.Value:
        """Return queries [B, S, heads * head_dim], normed and rotated, of ``q_proj``'s result."""
        a = self.architecture
        if a.qkv_clip is not None:
            projected = op.Clip(projected, -a.qkv_clip, a.qkv_clip)
        if a.qk_norm:
            projected = self._norm_heads(op, projected, self.q_norm, a.heads)
        return self._rotated(op, projected, a.heads, step)

    def split(self, op: Any, projected: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Split the packed projection into query, key and value."""
        query, key, value = op.Split(projected, [self.query_size, self.kv_size, self.kv_size], axis=-1, _outputs=3)
        return query, key, value

    def _clipped(self, op: Any, x: ir.Value) -> ir.Value:
        bound = self.architecture.qkv_clip
        return x if bound is None else op.Clip(x, -bound, bound)

    def _norm_heads(self, op: Any, x: ir.Value, norm: Norm, heads: int) -> ir.Value:
        if self.architecture.qk_norm == "all":
            return norm(op, x)
        split = op.Reshape(x, [0, 0, heads, self.architecture.head_dim])
        return op.Reshape(norm(op, split), [0, 0, heads * self.architecture.head_dim])

    def _rotate(self, op: Any, x: ir.Value, heads: int, rotation: Rotation, rows: ir.Value | None = None) -> ir.Value:
        """Rotate x by the angles of its tokens, or by those in the ``rows`` int64 [B, S] of a table of angles."""
        positions = self.architecture.positions
        assert isinstance(positions, Rotary)
        partial = {} if positions.dim == self.architecture.head_dim else {"rotary_embedding_dim": positions.dim}
        cos, sin = (cast(op, part, self.target.activations) for part in (rotation.cos, rotation.sin))
        return op.RotaryEmbedding(x, cos, sin, *([] if rows is None else [rows]), num_heads=heads, **partial)

    def rotated_key(self, op: Any, key: ir.Value, step: LayerStep) -> ir.Value:
        """Return keys [B, S, kv_heads * head_dim] as the cache has them, if the attention kernel rotates them."""
        if step.rotation is None or not step.rotation.of_every_position:
            return key
        return self._rotated(op, key, self.architecture.kv_heads, step)

    def _rotated(self, op: Any, x: ir.Value, heads: int, step: LayerStep) -> ir.Value:
        """Rotate x by an operator, whether or not the attention kernel could."""
        rotation = step.rotation if self.architecture.rotary_layers[self.index] else None
        if rotation is None:
            return x
        return self._rotate(op, x, heads, rotation, step.position_ids if rotation.of_every_position else None)

    def _positions(self, op: Any, step: LayerStep, cache: LayerCache) -> tuple[ir.Value | None, ir.Value | None]:
        """Return the cache's positions with the new ones appended, and the attention bias computed from them."""
        if cache.position is None:
            return None, step.bias
        assert step.position_ids is not None
        keys = position = cache.position
        if not step.append_later:
            keys = position = self.target.append_positions(op, cache.position, step.position_ids, step.cache_length)
        if step.total_length is not None:
            stop = op.Cast(op.Unsqueeze(step.total_length, [0]), to=ir.DataType.INT64)
            keys = op.Slice(position, [0], stop, [1])
        bias = attention_bias(op, self.architecture, self.index, step.position_ids, keys)
        return None if step.append_later else position, bias
