"""Write a layer of which tokens skip attention, the MLP or both, each under a condition.

Where every token has an entry in the layer's cache, keys and values are projected outside the condition, and a layer
that no token attends in appends them alone. Attention takes all tokens of a call in which one attends; the MLP takes
exactly the tokens that run it, and so does the adapter, but in a call in which no token runs the MLP: it takes all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.branch import either
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.step import FLOAT, LayerCache, LayerStep
from dynexport.exporter.lowering.target import cast
from dynexport.exporter.strategies.mod.gates import mlp_gate
from dynexport.exporter.strategies.mod.routing import Route, Routing
from dynexport.runtime.bundle.contract import Mod

# Key and value of all tokens, each [B, S, kv_heads * head_dim], as the cache has them.
Entries = tuple[ir.Value, ir.Value]


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

        def run(op: Any, attention: ir.Value) -> ir.Value:
            attended, places = self.routing.target.gather_tokens(op, attention, route.chosen)
            before = op.GatherND(hidden_states, places)
            strength = op.GatherND(route.strength, places)
            output = layer.after_attention(
                op, before, layer.self_attn.o_proj(op, attended), gate=mlp_gate(op, self.contract, strength)
            )
            changed: ir.Value = op.ScatterND(hidden_states, places, whole(op, self.contract, before, output, strength))
            return changed

        def skip(op: Any) -> ir.Value:
            return self.skipped(op, hidden_states, route)

        return self._if_attended(op, route, run, skip, hidden_states, step, cache)

    def attention(
        self, op: Any, hidden_states: ir.Value, step: LayerStep, cache: LayerCache, route: Route
    ) -> tuple[ir.Value, LayerCache]:
        """Write attention under a condition, and keys and values of all tokens outside of it."""

        def run(op: Any, attention: ir.Value) -> ir.Value:
            change = _times(op, self.layer.self_attn.o_proj(op, attention), self._gate(route.strength))
            chosen = op.Transpose(route.chosen, perm=[1, 2, 0])
            changed: ir.Value = op.Where(chosen, op.Add(hidden_states, change), hidden_states)
            return changed

        def skip(op: Any) -> ir.Value:
            return op.Identity(hidden_states)

        return self._if_attended(op, route, run, skip, hidden_states, step, cache)

    def mlp(self, op: Any, residual: ir.Value, route: Route) -> ir.Value:
        """Write the MLP under a condition, for the residual stream after attention, [B, S, hidden]."""

        def run(op: Any, tokens: ir.Value, strength: ir.Value) -> ir.Value:
            gate = mlp_gate(op, self.contract, strength)
            return _times(op, self.layer.mlp_of(op, tokens), self._gate(strength) if gate is None else gate)

        def some(op: Any) -> list[ir.Value]:
            return [self._of_tokens(op, residual, route.chosen, route, run)]

        def nobody(op: Any) -> list[ir.Value]:
            return [self.skipped(op, residual, route)]

        (output,) = either(op, anybody(op, route), some, nobody, 1, f"{self.name}_mlp")
        return output

    def skipped(self, op: Any, residual: ir.Value, route: Route) -> ir.Value:
        """Write what a call returns in which no token runs the MLP; that of padding does not matter."""
        output: ir.Value
        if self.contract.skip_branch == "none":
            output = op.Identity(residual)
        else:
            output = op.Add(residual, self._adapted(op, residual, route.strength))
        return output

    def adapter(self, op: Any, residual: ir.Value, route: Route) -> ir.Value:
        """Write the skip branch for the tokens that skip the MLP in a call in which others run it.

        It has a condition of its own: in a branch of another one its weights would be two scopes further out, where
        ONNX Runtime does not pack them, and a row's result would then depend on its neighbours, by rounding.
        """
        skips = op.And(self.routing.real, op.Not(route.chosen))

        def some(op: Any) -> list[ir.Value]:
            return [self._of_tokens(op, residual, skips, route, self._adapted)]

        def nobody(op: Any) -> list[ir.Value]:
            return [op.Identity(residual)]

        mixed = op.And(anybody(op, route), op.ReduceMax(skips, keepdims=0))
        (output,) = either(op, mixed, some, nobody, 1, f"{self.name}_adapter")
        return output

    def _adapted(self, op: Any, tokens: ir.Value, strength: ir.Value) -> ir.Value:
        """Return the skip branch's change of tokens [.., hidden] with strengths [.., 1]."""
        layer = self.layer
        output = layer.mod_adapter(op, layer.post_attention_layernorm(op, tokens))
        return _times(op, output, op.Sub(1.0, strength) if self.contract.gate == "split" else None)

    def _gate(self, strength: ir.Value) -> ir.Value | None:
        return strength if self.contract.gate in ("raw", "sigmoid") else None

    def _attend(
        self, op: Any, normed: ir.Value, entries: Entries, step: LayerStep, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Rotate queries as keys are rotated: by an operator, so that an entry does not depend on who attends."""
        attention = self.layer.self_attn
        query = attention.query(op, attention.q_proj(op, normed), step)
        return attention.attend(op, (query, *entries), replace(step, rotation=None), cache)

    def _entries(self, op: Any, normed: ir.Value, step: LayerStep) -> Entries:
        """Write keys and values of all tokens, under the layer's name."""
        attention = self.layer.self_attn
        op.builder.push_module(f"layers.{self.layer.index}")
        found: Entries = attention.entries(op, attention.kv_proj(op, normed), step)
        op.builder.pop_module()
        return found

    def _if_attended(
        self, op: Any, route: Route, run: Any, skip: Any, hidden_states: ir.Value, step: LayerStep, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write ``run`` of attention before its last product under a condition; else ``skip``, and append entries."""
        normed = self.layer.before_attention(op, hidden_states)
        entries = self._entries(op, normed, step)

        def attend(op: Any) -> list[ir.Value]:
            attention, present = self._attend(op, normed, entries, step, cache)
            return [run(op, attention), *present.values()]

        def append(op: Any) -> list[ir.Value]:
            present = [
                self.routing.target.append(op, past, cast(op, new, past.dtype), step.cache_length)
                for past, new in zip(cache.entries, entries, strict=True)
            ]
            return [skip(op), *present]

        output, key, value = either(op, anybody(op, route), attend, append, 3, self.name)
        return output, LayerCache(key, value)

    def _of_tokens(self, op: Any, residual: ir.Value, chosen: ir.Value, route: Route, run: Any) -> ir.Value:
        """Add ``run`` of the chosen tokens [N, hidden], N >= 1, and their strengths [N, 1] to the residual."""
        tokens, places = self.routing.target.gather_tokens(op, residual, chosen)
        change = run(op, tokens, op.GatherND(route.strength, places))
        added: ir.Value = op.ScatterND(residual, places, op.Add(tokens, change))
        return added


def anybody(op: Any, route: Route) -> ir.Value:
    """Return whether any token is chosen, a bool scalar."""
    found: ir.Value = op.ReduceMax(route.chosen, keepdims=0) if route.anybody is None else route.anybody
    return found


def whole(op: Any, contract: Mod, before: ir.Value, output: ir.Value, strength: ir.Value) -> ir.Value:
    """Return a block's result [N, hidden] for its input, its output and strengths [N, 1]."""
    if contract.gate not in ("raw", "sigmoid"):
        return output
    if contract.combine == "delta":
        return gated(op, before, output, strength)
    return cast(op, op.Mul(strength, cast(op, output, FLOAT)), output.dtype)


def _times(op: Any, change: ir.Value, gate: ir.Value | None) -> ir.Value:
    return change if gate is None else cast(op, op.Mul(gate, cast(op, change, FLOAT)), change.dtype)


__all__ = ["Parts", "anybody"]
