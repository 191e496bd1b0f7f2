"""A decode step of a Radial Network in one graph: one token of every row, all hops of its path.

Every hop has one layer module; each row multiplies by the weights of the layer that it chose. A token that has exited,
or has no allowed layer left, uses no weights and keeps its hidden state; the length of the cache does not count its
entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.build import WriteGraph
from dynexport.exporter.graph.decoder import POOL, CausalLM, DecoderLayer
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.step import FLOAT, INT64, LayerCache, Rotation, inverse_frequencies, rotation
from dynexport.exporter.graph.values import add_input, add_output, typed_value
from dynexport.exporter.lowering.tensorrt.selected import SelectedLayer
from dynexport.exporter.strategies.radial.checks import check_decode_graph
from dynexport.exporter.strategies.radial.layer import add_cache, layer_step
from dynexport.exporter.strategies.radial.paths import Decision, Paths
from dynexport.exporter.strategies.radial.router import Router
from dynexport.runtime.bundle.contract import Radial


def decode_graph(
    model: CausalLM,
    architecture: Architecture,
    selected: SelectedLayer,
    contract: Radial,
    routers: Sequence[Router],
) -> WriteGraph:
    """Return the writer of a graph: input_ids, position_ids int64 [B, 1] -> logits float32 [B, 1, vocab] and paths.

    Other inputs: cache_lengths int64 [hops, B]; token_counts int64 [B], 0 for an idle row; forced_paths int64
    [hops, B, 1], -1 where the router decides; ``past_key_values.{hop}.*``, caches of a fixed size. Other outputs:
    paths int64, path_scores and path_margins float32 [hops, B, 1]; ``present.*``.

    Args:
        model: the model without layers; the pool's layer module is added to it.
        architecture: the model's architecture.
        selected: lowers the layer module that stands for the pool.
        contract: the bundle's contract.
        routers: one router per hop.
    """
    # Rows whose layer has no rotary positions are rotated by angle 0 (``_angles``).
    alike = replace(architecture, rotary_layers=(any(architecture.rotary_layers),) * architecture.layers)
    setattr(model.model.layers, POOL, DecoderLayer(selected, alike, 0, key=POOL))

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        steps = range(contract.max_steps)
        input_ids, position_ids = (add_input(graph, name, INT64, ["B", 1]) for name in ("input_ids", "position_ids"))
        cache_lengths = add_input(graph, "cache_lengths", INT64, [len(steps), "B"])
        token_counts = add_input(graph, "token_counts", INT64, ["B"])
        forced = add_input(graph, "forced_paths", INT64, [len(steps), "B", 1])
        past = [add_cache(graph, architecture, selected, contract, f"past_key_values.{step}") for step in steps]

        hidden_states = model.model.embed(op, input_ids, position_ids)
        paths = Paths(op, contract, architecture.layers, op.Greater(token_counts, 0))
        pool = _Pool(op, model, architecture, selected, position_ids)
        present = []
        for step, router in enumerate(routers):
            wish = op.Squeeze(op.Gather(forced, step, axis=0), [1])
            decision = paths.decide(router, op.Squeeze(hidden_states, [1]), wish)
            length = op.Gather(cache_lengths, step, axis=0)
            hidden_states, cache = pool.run(decision, hidden_states, length, past[step])
            paths.follow(decision, decision.path(op))
            present.append(cache)

        logits = model.head(op, model.model.norm(op, hidden_states))
        add_output(graph, logits, "logits", typed_value("logits", FLOAT, ["B", 1, architecture.vocab_size]))
        for step, (before, after) in enumerate(zip(past, present, strict=True)):
            for value, (part, entries) in zip(after.values(), before.items(), strict=True):
                add_output(graph, value, f"present.{step}.{part}", entries)
        paths.put_out(graph, position_ids)
        check_decode_graph(graph, architecture, contract)

    return write


class _Pool:
    """The layer module that stands for the pool; one token of every row runs it once per hop."""

    def __init__(
        self, op: Any, model: CausalLM, architecture: Architecture, selected: SelectedLayer, position_ids: ir.Value
    ) -> None:
        self._op, self._architecture, self._selected, self._position_ids = op, architecture, selected, position_ids
        (self._layer,) = model.model.layers
        self._frequencies = inverse_frequencies(op, architecture)
        self._rotation = rotation(op, self._frequencies, position_ids)
        self._rotates = op.initializer(ir.tensor(np.array(architecture.rotary_layers, np.int64)), "rotary_layers")

    def run(
        self, decision: Decision, hidden_states: ir.Value, length: ir.Value, past: dict[str, ir.Value]
    ) -> tuple[ir.Value, LayerCache]:
        """Return float [B, 1, hidden] after each row's chosen layer, and the hop's cache with the tokens appended.

        Args:
            decision: the hop's decision.
            hidden_states: float [B, 1, hidden].
            length: int64 [B], number of entries in the cache.
            past: the hop's cache.
        """
        op = self._op
        index = op.Where(decision.goes, decision.choice, -1)
        self._selected.choose(op, index)
        step = layer_step(op, self._selected, hidden_states, self._position_ids, length)
        step = replace(step, rotation=self._angles())
        output, present = self._layer(op, hidden_states, step, LayerCache(**past))
        if decision.probability is not None:
            output = gated(op, hidden_states, output, op.Unsqueeze(decision.probability, [1, 2]))
        return op.Where(op.Unsqueeze(decision.goes, [1, 2]), output, hidden_states), present

    def _angles(self) -> Rotation | None:
        """Return the angles of every token's position.

        A token whose layer does not rotate gets position 0 without an attention factor, which changes nothing.
        """
        op, frequencies = self._op, self._frequencies
        if frequencies is None or all(self._architecture.rotary_layers):
            return self._rotation
        rotates = op.Unsqueeze(op.Gather(self._rotates, self._selected.layer), [1])
        if frequencies.factor != 1.0:
            rotated = op.Cast(op.Unsqueeze(rotates, [2]), to=ir.DataType.BOOL)
            frequencies = replace(frequencies, factor=op.Where(rotated, frequencies.factor, 1.0))
        return rotation(op, frequencies, op.Mul(self._position_ids, rotates))


__all__ = ["decode_graph"]
