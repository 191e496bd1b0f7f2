"""A decode step of a Radial Network in one graph for ONNX Runtime: all hops of one token of every row.

dynexport's CPU operators choose the layers and multiply by the weights of the chosen ones. A hop is inside an ``If``:
one in which no row has a layer costs its router's node and this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.branch import run_if
from dynexport.exporter.graph.build import WriteGraph
from dynexport.exporter.graph.decoder import POOL, CausalLM, DecoderLayer
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.step import (
    BOOL,
    FLOAT,
    INT32,
    INT64,
    LayerCache,
    LayerStep,
    Rotation,
    inverse_frequencies,
    rotation,
)
from dynexport.exporter.graph.values import add_input, add_output, typed_value
from dynexport.exporter.lowering.selected_onnxruntime import SelectedOnnxRuntime
from dynexport.exporter.strategies.radial.layer import add_cache
from dynexport.exporter.strategies.radial.router import Router
from dynexport.plugins.selections import HopChoice, RouterWeights, choose_layer
from dynexport.runtime.bundle.contract import Radial


@dataclass(frozen=True)
class _Inputs:
    """The graph's inputs; see ``selected_decode_graph``."""

    input_ids: ir.Value
    position_ids: ir.Value
    cache_lengths: ir.Value
    token_counts: ir.Value
    forced: ir.Value
    past: list[dict[str, ir.Value]]

    @classmethod
    def added(
        cls, graph: ir.Graph, architecture: Architecture, target: SelectedOnnxRuntime, contract: Radial
    ) -> _Inputs:
        """Add the inputs to the graph."""
        hops = contract.max_steps
        return cls(
            input_ids=add_input(graph, "input_ids", INT64, ["B", 1]),
            position_ids=add_input(graph, "position_ids", INT64, ["B", 1]),
            cache_lengths=add_input(graph, "cache_lengths", INT64, [hops, "B"]),
            token_counts=add_input(graph, "token_counts", INT64, ["B"]),
            forced=add_input(graph, "forced_paths", INT64, [hops, "B", 1]),
            past=[add_cache(graph, architecture, target, contract, f"past_key_values.{hop}") for hop in range(hops)],
        )


def selected_decode_graph(
    model: CausalLM,
    architecture: Architecture,
    selected: SelectedOnnxRuntime,
    contract: Radial,
    routers: Sequence[Router],
) -> WriteGraph:
    """Return the writer of a graph; inputs, outputs and arguments are those of ``decode.decode_graph``."""
    rotates = any(architecture.rotary_layers)
    alike = replace(architecture, rotary_layers=(rotates,) * architecture.layers)
    setattr(model.model.layers, POOL, DecoderLayer(selected, alike, 0, key=POOL))

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        given = _Inputs.added(graph, architecture, selected, contract)
        hidden_states = model.model.embed(op, given.input_ids, given.position_ids)
        index = op.Where(op.Greater(given.token_counts, 0), 0, -1)
        choices = contract.choices(architecture.layers)
        none = op.initializer(ir.tensor([[False] * choices]), "none_seen")
        seen = op.Expand(none, op.Concat(op.Shape(given.token_counts), [choices], axis=0))
        layer = _Layer(op, model, architecture, selected, contract, given)
        hops: list[HopChoice] = []
        present = []
        for hop, router in enumerate(routers):
            choice = choose_layer(
                op,
                hidden_states,
                _weights(router),
                given.forced,
                index,
                seen,
                epsilon=architecture.norm_epsilon,
                hop=hop,
                layers=architecture.layers,
                exits=contract.exit and hop >= contract.min_steps,
                reuses=contract.allow_reuse,
            )
            index, seen = choice.index, choice.seen
            hidden_states, cache = layer.run(hop, choice, hidden_states)
            hops.append(choice)
            present.append(cache)
        logits = model.head(op, model.model.norm(op, hidden_states))
        add_output(graph, logits, "logits", typed_value("logits", FLOAT, ["B", 1, architecture.vocab_size]))
        for hop, cache in enumerate(present):
            for value, (part, entries) in zip(cache.values(), given.past[hop].items(), strict=True):
                add_output(graph, value, f"present.{hop}.{part}", entries)
        for name, dtype, parts in (
            ("paths", INT64, [hop.path for hop in hops]),
            ("path_scores", FLOAT, [hop.score for hop in hops]),
            ("path_margins", FLOAT, [hop.margin for hop in hops]),
        ):
            add_output(graph, op.Concat(*parts, axis=0), name, typed_value(name, dtype, [len(hops), "B", 1]))

    return write


def _weights(router: Router) -> RouterWeights:
    return RouterWeights(router.norm.weight, router.fc1.weight, router.fc1.bias, router.fc2.weight, router.fc2.bias)


class _Layer:
    """The layer module that stands for the pool, and what all hops share."""

    def __init__(
        self,
        op: Any,
        model: CausalLM,
        architecture: Architecture,
        selected: SelectedOnnxRuntime,
        contract: Radial,
        given: _Inputs,
    ) -> None:
        self._op, self._selected, self._given = op, selected, given
        self._gated = contract.gate == "probability"
        (self._layer,) = model.model.layers
        total = op.Add(op.ReduceMax(given.cache_lengths, [1], keepdims=0), 1)
        # One operator for all hops: a Gather in each costs 2 us, and a layer in 4 bits takes 270.
        line = op.Cast(op.Reshape(given.cache_lengths, [-1]), to=INT32)
        self._lasts = _of_every_hop(op, line, contract.max_steps)
        self._totals = op.Cast(total, to=INT32)
        self._rotation = _rotation(op, architecture, selected, given.position_ids)
        self._still = _still_layers(op, architecture)

    def run(self, hop: int, choice: HopChoice, hidden_states: ir.Value) -> tuple[ir.Value, LayerCache]:
        """Return float [B, 1, hidden] after each row's chosen layer, and the hop's cache with the tokens appended."""
        given = self._given
        past = LayerCache(**given.past[hop])
        appends_positions = past.position is not None

        def layer(op: Any) -> tuple[ir.Value, LayerCache]:
            self._selected.choose(op, choice.index)
            step = LayerStep(
                position_ids=given.position_ids,
                rotation=self._angles(op, choice.index),
                cache_length=op.Gather(given.cache_lengths, hop) if appends_positions else given.cache_lengths,
                last_index=self._lasts[hop],
                total_length=op.Gather(self._totals, hop),
            )
            output, present = self._layer(op, hidden_states, step, past)
            if self._gated:
                output = gated(op, hidden_states, output, op.Unsqueeze(choice.gate, [1, 2]))
            return output, present

        return run_if(self._op, choice.any, layer, hidden_states, past, f"hop_{hop}")

    def _angles(self, op: Any, index: ir.Value) -> Rotation | None:
        """Return the angles of every row; one whose layer does not rotate has cos 1 and sin 0."""
        angles = self._rotation
        if angles is None or self._still is None:
            return angles
        still = op.Unsqueeze(op.Gather(self._still, op.Max(index, 0)), [1, 2])
        return Rotation(op.Where(still, 1.0, angles.cos), op.Where(still, 0.0, angles.sin), of_every_position=False)


def _of_every_hop(op: Any, line: ir.Value, hops: int) -> Sequence[ir.Value]:
    """Return the parts of [hops * n], each [n]."""
    return (line,) if hops == 1 else op.Split(line, axis=0, num_outputs=hops, _outputs=hops)


def _rotation(
    op: Any, architecture: Architecture, selected: SelectedOnnxRuntime, position_ids: ir.Value
) -> Rotation | None:
    """Return the angles of every position for a kernel that rotates; else, or with still layers, of the step's."""
    frequencies = inverse_frequencies(op, architecture)
    if selected.rotates_in_attention(architecture) and all(architecture.rotary_layers):
        return rotation(op, frequencies, op.Range(0, architecture.max_length, 1), of_every_position=True)
    return rotation(op, frequencies, position_ids)


def _still_layers(op: Any, architecture: Architecture) -> ir.Value | None:
    """Return bool [layers], true for layers without rotary positions; None where all layers are alike."""
    rotary = architecture.rotary_layers
    if len(set(rotary)) == 1:
        return None
    still: ir.Value = op.initializer(ir.tensor([not rotates for rotates in rotary], dtype=BOOL), "still_layers")
    return still


__all__ = ["selected_decode_graph"]
