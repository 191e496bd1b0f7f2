"""Build an ONNX model from a graph plan and the decoder's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import GraphBuilder

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.step import BOOL, FLOAT, INT64, LayerCache, Step, StepInputs, inverse_frequencies
from dynexport.exporter.graph.values import add_input, add_output, register_weights, typed_value
from dynexport.exporter.graph.writer import LayerWriter
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target

IR_VERSION = 11
WriteGraph = Callable[[ir.Graph, Any, CausalLM], None]


def build_graph(plan: GraphPlan, model: CausalLM, target: Target, writer: LayerWriter) -> ir.Model:
    """Build the graph of a whole step; its weights have no values yet.

    Inputs: ``input_ids`` and ``position_ids`` int64 [B, S]; ``cache_lengths`` int64 [L, B]; ``layer_active`` bool [L]
    in a conditional graph; ``logits_indices`` int64 [B, K]; the writer's own inputs; ``past_key_values.{i}.key`` and
    ``.value`` [B, kv_heads, M, cache_head_dim], of the target's type of caches, and ``.position`` int64 [B, M]
    where a layer needs it; a layer without attention has none. L is the number of layers in the plan. M is a constant
    for a target with fixed slots.
    cache_head_dim is head_dim, or larger if the target pads it.
    Outputs: ``logits`` float32 [B, K, vocab]; ``present.{i}.*`` like the inputs, to be bound to the same buffers; the
    writer's own outputs.
    """
    architecture = model.architecture
    graph = _new_graph(plan.name, target)
    op = GraphBuilder(graph).op
    inputs = _step_inputs(graph, op, architecture, plan)
    writer.begin(op, graph, inputs)
    caches = {i: _cache(graph, architecture, plan, target, i, writer.slots(i)) for i in plan.layers}
    register_weights(graph, model, target)
    step = Step.prepare(op, architecture, inputs, plan, target)
    logits, present = model(op, step, caches, writer.run_layer)

    add_output(graph, logits, "logits", typed_value("logits", FLOAT, ["B", "K", architecture.vocab_size]))
    for i in plan.layers:
        for past, value in zip(caches[i].values(), present[i].values(), strict=True):
            add_output(graph, value, str(past.name).replace("past_key_values", "present"), past)
    writer.finish(op, graph)
    return _finished(graph, target)


def build_part(name: str, model: CausalLM, target: Target, write: WriteGraph) -> ir.Model:
    """Build another graph with only the weights it uses; they have no values yet."""
    graph = _new_graph(name, target)
    op = GraphBuilder(graph).op
    register_weights(graph, model, target)
    write(graph, op, model)
    for initializer in [value for value in graph.initializers.values() if not value.uses()]:
        del graph.initializers[str(initializer.name)]
    _move_to_branches(graph)
    return _finished(graph, target)


def _move_to_branches(graph: ir.Graph) -> None:
    """Move every weight that one branch uses into it: ONNX Runtime packs no weights from two scopes further out."""
    for name, value in list(graph.initializers.items()):
        users = {id(node.graph): node.graph for node, _ in value.uses()}
        (branch, *others) = users.values()
        if isinstance(branch, ir.Graph) and branch is not graph and not others:
            del graph.initializers[name]
            branch.initializers[name] = value


def _new_graph(name: str, target: Target) -> ir.Graph:
    return ir.Graph([], [], nodes=[], name=name, opset_imports=dict(target.opset_imports))


def _finished(graph: ir.Graph, target: Target) -> ir.Model:
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="dynexport")
    RemoveUnusedNodesPass()(model)  # values of all layers that this graph's layers do not use
    target.finish(model)
    return model


def _step_inputs(graph: ir.Graph, op: Any, architecture: Architecture, plan: GraphPlan) -> StepInputs:
    count = len(plan.layers)
    return StepInputs(
        input_ids=add_input(graph, "input_ids", INT64, ["B", "S"]),
        position_ids=add_input(graph, "position_ids", INT64, ["B", "S"]),
        cache_lengths=add_input(graph, "cache_lengths", INT64, [count, "B"]),
        layer_active=add_input(graph, "layer_active", BOOL, [count]) if plan.conditional else None,
        logits_indices=add_input(graph, "logits_indices", INT64, ["B", "K"]),
        frequencies=inverse_frequencies(op, architecture),
        sliding_frequencies=inverse_frequencies(op, architecture, sliding=True),
    )


def _cache(
    graph: ir.Graph, architecture: Architecture, plan: GraphPlan, target: Target, layer: int, slots: int | str
) -> LayerCache:
    heads = architecture.sizes_of(layer).kv_heads
    if not heads:
        return LayerCache()
    shape: list[int | str] = ["B", heads, slots, target.cache_head_dim(architecture.head_dim)]
    key, value = (
        add_input(graph, f"past_key_values.{layer}.{part}", target.cache_dtype, shape) for part in ("key", "value")
    )
    if layer in plan.contiguous or not architecture.needs_key_positions(layer):
        return LayerCache(key, value)
    return LayerCache(key, value, add_input(graph, f"past_key_values.{layer}.position", INT64, ["B", slots]))


__all__ = ["WriteGraph", "build_graph", "build_part"]
