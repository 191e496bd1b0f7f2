"""The whole decoder: embedding, layers, final norm, head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.families.architecture import Architecture, LearnedPositions
from dynexport.exporter.graph.attention import Attention
from dynexport.exporter.graph.experts import MixtureOfExperts
from dynexport.exporter.graph.layers import Embedding, Linear, Mlp, Norm
from dynexport.exporter.graph.step import FLOAT, LayerCache, LayerStep, Line, Step
from dynexport.exporter.lowering.target import Target, cast

LAYERS = "layers"
# Replaces the layer number in the names of weights that are stacked over all layers of a pool.
POOL = "pool"


class DecoderLayer(nn.Module):
    """One decoder layer: attention and MLP, each with its norms, in sequence or in parallel; either may be absent.

    Args:
        key: replaces the layer number in the names of the weights.
    """

    def __init__(self, target: Target, architecture: Architecture, index: int, key: str | None = None) -> None:
        super().__init__(f"{LAYERS}.{index if key is None else key}")
        a = self.architecture = architecture
        self.index = index
        own = a.sizes_of(index)
        experts = a.experts_of(index)
        self.has_attention, self.has_mlp = own.heads > 0, own.intermediate_size > 0 or experts is not None

        def norm() -> Norm:
            return Norm(target, a.norm, a.hidden_size, a.norm_epsilon)

        if self.has_attention:
            if a.pre_norms:
                self.input_layernorm = norm()
            self.self_attn = Attention(target, a, index)
        if not a.shared_norm and (self.has_attention if a.post_norms else self.has_mlp):
            self.post_attention_layernorm = norm()
        if self.has_mlp:
            if a.post_norms:
                if a.pre_norms:
                    self.pre_feedforward_layernorm = norm()
                self.post_feedforward_layernorm = norm()
            self.mlp: MixtureOfExperts | Mlp
            if experts is not None:
                self.mlp = MixtureOfExperts(target, a, experts)
            else:
                width = own.intermediate_size
                self.mlp = Mlp(target, a.hidden_size, width, a.activation, gated=a.gated_mlp, bias=a.mlp_bias)

    @property
    def is_empty(self) -> bool:
        """Return whether the layer has neither attention nor MLP."""
        return not (self.has_attention or self.has_mlp)

    def forward(
        self, op: Any, hidden_states: ir.Value, step: LayerStep | Line, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Return the hidden states [B, S, hidden] or [N, hidden] and the cache after the layer."""
        if not self.has_attention:
            return self.after_attention(op, hidden_states, None), cache
        attention, present = self.self_attn(op, self.before_attention(op, hidden_states), step, cache)
        return self.after_attention(op, hidden_states, attention), present

    def before_attention(self, op: Any, hidden_states: ir.Value) -> ir.Value:
        """Return the input of attention from the layer's input, both [B, S, hidden]."""
        normed: ir.Value = self.input_layernorm(op, hidden_states) if self.architecture.pre_norms else hidden_states
        return normed

    def run_as(self, index: int) -> DecoderLayer:
        """Return the layer with the same weights, at another place of those that a token runs."""
        if index == self.index:
            return self
        other = copy.copy(self)
        other.index = index
        other._set_name(f"{LAYERS}.{index}")
        return other

    def after_attention(
        self, op: Any, hidden_states: ir.Value, attention: ir.Value | None, *, gate: ir.Value | None = None
    ) -> ir.Value:
        """Return the layer's output from its input and its attention output, all [B, S, hidden].

        ``gate`` float32 [B, S, 1] multiplies the output of the MLP of a layer in sequence; None: 1.
        """
        a = self.architecture
        if attention is None and not self.has_mlp:
            return op.Identity(hidden_states)
        if a.residual == "parallel":
            # The same norm of the same input a second time: engines compute it once.
            norm = self.input_layernorm if a.shared_norm else self.post_attention_layernorm
            return op.Add(op.Add(self.mlp(op, norm(op, hidden_states)), attention), hidden_states)
        if attention is not None and a.residual_scale is not None:
            attention = op.Mul(attention, a.residual_scale)
        if not self.has_mlp:
            return op.Add(hidden_states, self.post_attention_layernorm(op, attention) if a.post_norms else attention)
        normed, residual = self._before_mlp(op, hidden_states, attention)
        mlp = self.mlp(op, normed)
        if a.norms_of_sums:
            return self.post_feedforward_layernorm(op, mlp, residual)[0]
        if a.post_norms:
            mlp = self.post_feedforward_layernorm(op, mlp)
        if a.residual_scale is not None:
            mlp = op.Mul(mlp, a.residual_scale)
        if gate is not None:
            mlp = cast(op, op.Mul(gate, cast(op, mlp, FLOAT)), mlp.dtype)
        return op.Add(residual, mlp)

    def mlp_of(self, op: Any, residual: ir.Value) -> ir.Value:
        """Return the MLP's output for the residual stream after attention, where one norm stands between them."""
        output: ir.Value = self.mlp(op, self.post_attention_layernorm(op, residual))
        return output

    def _before_mlp(self, op: Any, hidden_states: ir.Value, attention: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """Return the MLP's input and the residual stream after attention."""
        a = self.architecture
        if attention is not None and a.norms_of_sums:
            residual = self.post_attention_layernorm(op, attention, hidden_states)[0]
            return self.pre_feedforward_layernorm(op, residual), residual
        if attention is not None and a.post_norms:
            attention = self.post_attention_layernorm(op, attention)
        if not a.pre_norms:
            residual = hidden_states if attention is None else op.Add(hidden_states, attention)
            return residual, residual
        norm = self.pre_feedforward_layernorm if a.post_norms else self.post_attention_layernorm
        if attention is None:
            return norm(op, hidden_states), hidden_states
        normed, residual = norm(op, attention, hidden_states)
        return normed, residual


RunLayer = Callable[[Any, DecoderLayer, ir.Value, Step, LayerCache], tuple[ir.Value, LayerCache]]


class Decoder(nn.Module):
    """The embedding, the given layers and the final norm."""

    def __init__(self, target: Target, architecture: Architecture, layers: Sequence[int]) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.embed_tokens = Embedding(target, a.vocab_size, a.hidden_size, tied=a.tied_embeddings)
        if isinstance(a.positions, LearnedPositions):
            self.embed_positions = Embedding(target, a.positions.rows, a.hidden_size, tied=False)
        if a.embedding_norm:
            self.embed_norm = Norm(target, a.norm, a.hidden_size, a.norm_epsilon)
        self.layers = nn.ModuleList([])
        for index in dict.fromkeys(a.weights_of[index] for index in layers):
            # The attribute is the layer's number in the model, also if the graph leaves out other layers.
            setattr(self.layers, str(index), DecoderLayer(target, a, index))
        self.runs = [getattr(self.layers, str(a.weights_of[index])).run_as(index) for index in layers]
        self.norm = Norm(target, a.norm, a.hidden_size, a.norm_epsilon)

    def embed(self, op: Any, input_ids: ir.Value, position_ids: ir.Value) -> ir.Value:
        """Return hidden_states [B, S, hidden] of input_ids and position_ids, both int64 [B, S]."""
        a = self.architecture
        hidden_states = self.embed_tokens(op, input_ids)
        if isinstance(a.positions, LearnedPositions):
            rows = op.Add(position_ids, a.positions.offset) if a.positions.offset else position_ids
            hidden_states = op.Add(hidden_states, self.embed_positions(op, rows))
        if a.embedding_scale is not None:
            hidden_states = op.Mul(hidden_states, float(a.embedding_scale))
        return self.embed_norm(op, hidden_states) if a.embedding_norm else hidden_states

    def forward(
        self,
        op: Any,
        step: Step,
        caches: dict[int, LayerCache],
        run_layer: RunLayer,
    ) -> tuple[ir.Value, dict[int, LayerCache]]:
        """Return normed hidden states [B, K, hidden] of the tokens at logits_indices, and the caches after the step."""
        hidden_states = self.embed(op, step.inputs.input_ids, step.inputs.position_ids)
        # `dynexport verify` reports the first layer that diverges under these names.
        hidden_states.name = "hidden_states.embedding"
        present = {}
        for layer in self.runs:
            hidden_states, present[layer.index] = run_layer(op, layer, hidden_states, step, caches[layer.index])
            hidden_states.name = f"hidden_states.{layer.index}"
        wanted = op.GatherND(hidden_states, op.Unsqueeze(step.inputs.logits_indices, [-1]), batch_dims=1)
        return self.norm(op, wanted), present


class CausalLM(nn.Module):
    """The decoder with its head; ``run_layer`` writes each layer, with or without a condition."""

    def __init__(self, target: Target, architecture: Architecture, layers: Sequence[int]) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.model = Decoder(target, a, layers)
        if not a.tied_embeddings:
            storage = target.head_storage([a.vocab_size, a.hidden_size])
            self.lm_head = Linear(target, a.hidden_size, a.vocab_size, bias=a.head_bias, storage=storage)

    def forward(
        self,
        op: Any,
        step: Step,
        caches: dict[int, LayerCache],
        run_layer: RunLayer,
    ) -> tuple[ir.Value, dict[int, LayerCache]]:
        """Return logits float32 [B, K, vocab] of the tokens at logits_indices int64 [B, K], and the caches."""
        hidden_states, present = self.model(op, step, caches, run_layer)
        return self.head(op, hidden_states), present

    def head(self, op: Any, hidden_states: ir.Value) -> ir.Value:
        """Return logits float32 [B, K, vocab] of normed hidden states [B, K, hidden]."""
        a = self.architecture
        tied = a.tied_embeddings
        if a.logits_scale is not None:  # before the product, which has many more columns
            hidden_states = op.Mul(hidden_states, a.logits_scale)
        logits = self.model.embed_tokens.attend(op, hidden_states) if tied else self.lm_head(op, hidden_states)
        logits = cast(op, logits, FLOAT)
        if a.logits_softcap is not None:
            logits = op.Mul(op.Tanh(op.Div(logits, a.logits_softcap)), a.logits_softcap)
        return logits
