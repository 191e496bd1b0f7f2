"""Write a layer of which tokens skip attention, the MLP or both, each under a condition.

Where every token has an entry in the layer's cache, keys and values are projected outside the condition, and a layer
that no token attends in appends them alone. Attention takes all tokens of a call in which one attends; the MLP and the
adapter take exactly the tokens that run them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.branch import either
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.step import FLOAT, LayerCache, LayerStep
from dynexport.exporter.lowering.target import cast
from dynexport.exporter.strategies.mod.routing import Route, Routing
from dynexport.runtime.bundle.contract import Mod


@dataclass(frozen=True)
class Parts:
    """A layer of which tokens skip parts.

    Attributes:
        layer: the layer.
        routing: the routing of the graph.
        name: prefix of the branches' names.
    """

    layer: DecoderLayer
    routing: Routing
    name: str

    @property
    def contract(self) -> Mod:
        return self.routing.contract

    def block(
        self, op: Any, hidden_states: ir.Value, step: LayerStep, cache: LayerCache, route: Route
    ) -> tuple[ir.Value, LayerCache]:
        """Write attention and MLP under one condition, and keys and values of all tokens outside of it."""
        layer = self.layer
        normed = layer.before_attention(op, hidden_states)
        entries = layer.self_attn.kv_proj(op, normed)

        def run(op: Any) -> list[ir.Value]:
            attention, present = self._attend(op, normed, entries, step, cache)
            attended, places = self.routing.target.gather_tokens(op, attention, route.chosen)
            before = op.GatherND(hidden_states, places)
            score = op.GatherND(route.score, places)
            output = layer.after_attention(
                op, before, layer.self_attn.o_proj(op, attended), gate=mlp_gate(op, self.contract, score)
            )
            output = whole(op, self.contract, before, output, score)
            return [op.ScatterND(hidden_states, places, output), *present.values()]

        return self._if_attended(op, route, run, hidden_states, entries, step, cache)

    def attention(
        self, op: Any, hidden_states: ir.Value, step: LayerStep, cache: LayerCache, route: Route
    ) -> tuple[ir.Value, LayerCache]:
        """Write attention under a condition, and keys and values of all tokens outside of it."""
        layer = self.layer
        normed = layer.before_attention(op, hidden_states)
        entries = layer.self_attn.kv_proj(op, normed)

        def run(op: Any) -> list[ir.Value]:
            attention, present = self._attend(op, normed, entries, step, cache)
            change = _times(op, layer.self_attn.o_proj(op, attention), self._gate(op, route.score))
            chosen = op.Transpose(route.chosen, perm=[1, 2, 0])
            return [op.Where(chosen, op.Add(hidden_states, change), hidden_states), *present.values()]

        return self._if_attended(op, route, run, hidden_states, entries, step, cache)

    def mlp(self, op: Any, residual: ir.Value, route: Route) -> ir.Value:
        """Write the MLP under a condition, for the residual stream after attention, [B, S, hidden]."""

        def run(op: Any, tokens: ir.Value, score: ir.Value) -> ir.Value:
            gate = mlp_gate(op, self.contract, score)
            return _times(op, self.layer.mlp_of(op, tokens), self._gate(op, score) if gate is None else gate)

        return self._some(op, residual, route.chosen, route, run, "mlp")

    def adapter(self, op: Any, residual: ir.Value, route: Route) -> ir.Value:
        """Write the skip branch under a condition, for the tokens that skip the MLP."""
        skips = op.And(self.routing.real, op.Not(route.chosen))

        def run(op: Any, tokens: ir.Value, score: ir.Value) -> ir.Value:
            layer = self.layer
            output = layer.mod_adapter(op, layer.post_attention_layernorm(op, tokens))
            split = self.contract.gate == "split"
            return _times(op, output, op.Sub(1.0, op.Sigmoid(score)) if split else None)

        return self._some(op, residual, skips, route, run, "adapter")

    def _gate(self, op: Any, score: ir.Value) -> ir.Value | None:
        if self.contract.gate == "sigmoid":
            found: ir.Value = op.Sigmoid(score)
            return found
        return score if self.contract.gate == "raw" else None

    def _attend(
        self, op: Any, normed: ir.Value, entries: ir.Value, step: LayerStep, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        attention = self.layer.self_attn
        packed = op.Concat(attention.q_proj(op, normed), entries, axis=-1)
        return attention.attend(op, attention.prepare(op, packed, step.rotation), step, cache)

    def _if_attended(
        self,
        op: Any,
        route: Route,
        run: Any,
        hidden_states: ir.Value,
        entries: ir.Value,
        step: LayerStep,
        cache: LayerCache,
    ) -> tuple[ir.Value, LayerCache]:
        def skip(op: Any) -> list[ir.Value]:
            added = self.layer.self_attn.entries(op, entries, step)
            present = [
                self.routing.target.append(op, past, cast(op, new, past.dtype), step.cache_length)
                for past, new in zip((cache.key, cache.value), added, strict=True)
            ]
            return [op.Identity(hidden_states), *present]

        output, key, value = either(op, anybody(op, route.chosen), run, skip, 3, self.name)
        return output, LayerCache(key, value)

    def _some(self, op: Any, residual: ir.Value, chosen: ir.Value, route: Route, run: Any, name: str) -> ir.Value:
        """Add ``run`` of some tokens [N, hidden] and their scores [N, 1] to the residual stream, if there are any."""

        def write(op: Any) -> list[ir.Value]:
            tokens, places = self.routing.target.gather_tokens(op, residual, chosen)
            change = run(op, tokens, op.GatherND(route.score, places))
            return [op.ScatterND(residual, places, op.Add(tokens, change))]

        (output,) = either(op, anybody(op, chosen), write, lambda op: [op.Identity(residual)], 1, f"{self.name}_{name}")
        return output


def anybody(op: Any, chosen: ir.Value) -> ir.Value:
    """Return whether any token is chosen, a bool scalar."""
    found: ir.Value = op.ReduceMax(chosen, keepdims=0)
    return found


def mlp_gate(op: Any, contract: Mod, score: ir.Value) -> ir.Value | None:
    """Return the factor of the MLP's branch for scores [.., 1], where it has one of its own; else None."""
    if contract.gate == "affine":
        assert contract.affine is not None
        offset, slope = contract.affine
        factor: ir.Value = op.Add(op.Mul(op.Sigmoid(score), slope), offset)
        return factor
    return op.Sigmoid(score) if contract.gate == "split" else None


def whole(op: Any, contract: Mod, before: ir.Value, output: ir.Value, score: ir.Value) -> ir.Value:
    """Return a block's result [N, hidden] for its input, its output and scores [N, 1]."""
    if contract.gate not in ("raw", "sigmoid"):
        return output
    gate = op.Sigmoid(score) if contract.gate == "sigmoid" else score
    if contract.combine == "delta":
        return gated(op, before, output, gate)
    return cast(op, op.Mul(gate, cast(op, output, FLOAT)), output.dtype)


def _times(op: Any, change: ir.Value, gate: ir.Value | None) -> ir.Value:
    return change if gate is None else cast(op, op.Mul(gate, cast(op, change, FLOAT)), change.dtype)


__all__ = ["Parts", "anybody", "mlp_gate"]
