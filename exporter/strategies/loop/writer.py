"""Write the runs of a looped model's layers: all, those of a depth, or those that tokens have not exited from."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.branch import either
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.step import LayerCache, LayerStep, Step, StepInputs
from dynexport.exporter.graph.writer import ConditionalWriter, LayerWriter
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target, cast
from dynexport.exporter.strategies.loop.between import Between
from dynexport.exporter.strategies.loop.exits import Exits

Entry = tuple[ir.Value, ir.Value]


class LoopWriter(ConditionalWriter):
    """Writes the runs of layers.

    A loop's last hidden states stay as they are, so that a depth of fewer loops ends with the final norm alone.
    """

    def __init__(self, plan: GraphPlan, architecture: Architecture, target: Target, between: Between) -> None:
        super().__init__(plan, architecture, target)
        self._between = between

    def write(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        entered = self._between.enter(op, layer.index, hidden_states)
        return super().write(op, layer, entered, step, cache)


class ExitWriter(LayerWriter):
    """Writes all runs for all tokens, and takes each token's state after the loop that it exits at."""

    def __init__(
        self, plan: GraphPlan, architecture: Architecture, target: Target, between: Between, exits: Exits
    ) -> None:
        super().__init__(plan, architecture, target)
        self.exits, self.between = exits, between
        order = between.order
        self._last = {order.loop(number)[-1]: number for number in range(order.loops)}

    def begin(self, op: Any, graph: ir.Graph, inputs: StepInputs) -> None:
        self.exits.begin(op, graph)

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        if self.between.loop_from(layer.index) == 0:
            adapter = self.between.adapter
            self.exits.rule.begin(op, hidden_states if adapter is None else adapter.start_value(op))
        output, present = self.run(op, layer, hidden_states, step, cache)
        number = self._last.get(layer.index)
        if number is None:
            return output, present
        self.exits.after_loop(op, number, output)
        return (self.kept if number == self.exits.loops - 1 else output), present

    @property
    def kept(self) -> ir.Value:
        """The state of every token after its last loop, [B, S, hidden]."""
        assert self.exits.hidden_states is not None
        return self.exits.hidden_states

    def run(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write one run; what it makes of tokens that have exited does not matter."""
        entered = self.between.enter(op, layer.index, hidden_states)
        return super().run_layer(op, layer, entered, step, cache)

    def finish(self, op: Any, graph: ir.Graph) -> None:
        self.exits.finish(op, graph)


class ReusingWriter(ExitWriter):
    """Writes later loops under a condition; an exited token's entries there are copies of those of its last loop."""

    def begin(self, op: Any, graph: ir.Graph, inputs: StepInputs) -> None:
        super().begin(op, graph, inputs)
        self._entries: dict[int, Entry] = {}

    def run(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        number, order = layer.index, self.between.order
        if not order.before <= number < order.before + order.loops * order.body:
            return super().run(op, layer, hidden_states, step, cache)
        weights, inputs = self.architecture.weights_of[number], step.for_layer(op, number)
        before = self._entries.get(weights)
        if before is None:
            op.builder.push_module(f"layers.{number}")
            entered = self.between.enter(op, number, hidden_states)
            output, present, entry = self._run(op, layer, entered, inputs, cache, None)
            op.builder.pop_module()
            self._entries[weights] = entry
            return output, present
        earlier, state = before, hidden_states
        if self.between.loop_from(number):
            self._anybody, state = self.exits.anybody(op), self.kept
        normed = self.exits.rule.normed

        def run(op: Any) -> list[ir.Value]:
            entered = self.between.enter(op, number, state, normed)
            output, present, entry = self._run(op, layer, entered, inputs, cache, earlier)
            return [output, *present.values(), *entry]

        def reuse(op: Any) -> list[ir.Value]:
            key, value = layer.self_attn.rotated_key(op, earlier[0], inputs), earlier[1]
            present = [
                self.target.append(op, past, cast(op, new, self.target.cache_dtype), inputs.cache_length)
                for past, new in zip(cache.entries, (key, value), strict=True)
            ]
            return [op.Identity(state), *present, *map(op.Identity, earlier)]

        output, past_key, past_value, *last = either(op, self._anybody, run, reuse, 5, f"layer_{layer.index}")
        self._entries[weights] = (last[0], last[1])
        return output, LayerCache(past_key, past_value)

    def _run(
        self,
        op: Any,
        layer: DecoderLayer,
        hidden_states: ir.Value,
        inputs: LayerStep,
        cache: LayerCache,
        before: Entry | None,
    ) -> tuple[ir.Value, LayerCache, Entry]:
        """Write a layer; exited tokens have the keys and values of ``before``. Return its keys and values too."""
        attention = layer.self_attn
        projected = attention.qkv_proj(op, layer.input_layernorm(op, hidden_states))
        query, key, value = attention.prepare(op, projected, inputs.rotation)
        if key is None or value is None:
            query, key, value = attention.split(op, query)
        if before is not None:
            live, (old_key, old_value) = self.exits.live, before
            key, value = op.Where(live, key, old_key), op.Where(live, value, old_value)
        output, present = attention.attend(op, (query, key, value), inputs, cache)
        return layer.after_attention(op, hidden_states, attention.o_proj(op, output)), present, (key, value)


__all__ = ["ExitWriter", "LoopWriter", "ReusingWriter"]
