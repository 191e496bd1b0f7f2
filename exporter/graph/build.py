"""From a plan and a model of modules to an ONNX model: the graph's inputs and outputs, and the modules between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.decoder import CausalLM, RunLayer
from dynexport.exporter.graph.routed_caches import routed_caches
from dynexport.exporter.graph.routing import Routing, StepInputs, outputs
from dynexport.exporter.graph.step import BOOL, FLOAT, INT64, LayerCache, Step, inverse_frequencies
from dynexport.exporter.graph.structure import check_structure
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.runtime.bundle.contract import AnyContract, Mod

IR_VERSION = 11


def build_graph(
    plan: GraphPlan, model: CausalLM, target: Target, contract: AnyContract, run_layer: RunLayer
) -> ir.Model:
    """Build one graph, its weights still without values.

    Inputs: ``input_ids`` and ``position_ids`` int64 [B, S]; ``cache_lengths`` int64 [L, B]; ``layer_active`` bool [L]
    in a conditional graph; ``logits_indices`` int64 [B, K]; ``past_key_values.{i}.key`` and ``.value``
    [B, kv_heads, M, cache_head_dim], of the target's type of activations, and ``.position`` int64 [B, M] where a layer
    needs it. L counts the plan's layers. M is a number where the target wants it to be, and cache_head_dim is head_dim
    where the target takes that.
    Outputs: ``logits`` float32 [B, K, vocab]; ``present.{i}.*`` like the inputs, to be bound to the same buffers.

    A Mixture-of-Depths graph has further inputs: ``token_counts`` int64 [B], ``forced_routes`` int64 [R, B, S], and
    ``is_prompt`` bool where prompts choose by top-k; and outputs: ``routes`` bool, ``route_scores`` and
    ``route_margins`` float32 [R, B, S], ``overflow`` int64 [R, B]. R counts the routed layers.
    """
    architecture = model.architecture
    graph = ir.Graph([], [], nodes=[], name=plan.name, opset_imports=dict(target.opset_imports))
    builder = GraphBuilder(graph)
    count = len(plan.layers)
    input_ids = add_input(graph, "input_ids", INT64, ["B", "S"])
    position_ids = add_input(graph, "position_ids", INT64, ["B", "S"])
    cache_lengths = add_input(graph, "cache_lengths", INT64, [count, "B"])
    active = add_input(graph, "layer_active", BOOL, [count]) if plan.conditional else None
    logits_indices = add_input(graph, "logits_indices", INT64, ["B", "K"])
    frequencies = inverse_frequencies(builder.op, architecture)
    routing = None
    if isinstance(contract, Mod):
        given = {
            "position_ids": position_ids,
            "inverse_frequencies": frequencies,
            "cache_lengths": cache_lengths,
        }
        routing = _routing(graph, builder.op, architecture, contract, plan, target, given)
    caches = {i: _cache(graph, architecture, plan, contract, target, i) for i in plan.layers}

    register_parameters(graph, model)
    step = Step.prepare(
        builder.op,
        architecture,
        input_ids,
        position_ids,
        cache_lengths,
        active,
        frequencies,
        layers=plan.layers,
        contiguous=plan.contiguous,
        together=plan.together,
        kernel_rotates=target.rotates_in_attention(architecture),
        fixed_slots=target.fixed_slots,
        routing=routing,
    )
    logits, present = model(builder.op, input_ids, step, caches, logits_indices, run_layer)

    expected = typed_value("logits", FLOAT, ["B", "K", architecture.vocab_size])
    add_output(graph, logits, "logits", expected)
    for i in plan.layers:
        for past, value in zip(caches[i].values(), present[i].values(), strict=True):
            name = str(past.name).replace("past_key_values", "present")
            add_output(graph, value, name, past)
    if routing is not None:
        for name, value in outputs(builder.op, routing).items():
            shape: list[int | str] = [len(routing.routes), "B", "S"]
            dtype = {"routes": BOOL, "overflow": INT64}.get(name, FLOAT)
            add_output(graph, value, name, typed_value(name, dtype, shape[:2] if name == "overflow" else shape))
        check_structure(graph, architecture, routing)
    finished = ir.Model(graph, ir_version=IR_VERSION, producer_name="dynexport")
    target.finish(finished)
    return finished


def register_parameters(graph: ir.Graph, model: CausalLM) -> None:
    """Put every weight into the graph under its full name.

    onnxscript would name a parameter when it is first used, by the scope of the outermost builder: inside an ``If``
    that scope lacks the layer, and all layers' names would collide.
    """
    for name, parameter in model.named_parameters():
        parameter.name = name
        graph.initializers[name] = parameter
        parameter._realized = True


def typed_value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A value of this type and shape."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A new input."""
    value = typed_value(name, dtype, shape)
    graph.inputs.append(value)
    return value


def add_output(graph: ir.Graph, value: ir.Value, name: str, like: ir.Value) -> None:
    """Make a value an output, with the type and shape of another."""
    value.name, value.type, value.shape = name, like.type, like.shape
    graph.outputs.append(value)


def _routing(
    graph: ir.Graph,
    op: Any,
    architecture: Architecture,
    contract: Mod,
    plan: GraphPlan,
    target: Target,
    given: dict[str, Any],
) -> Routing:
    prompts_by_rank = contract.prefill == "topk" and not plan.only_decodes
    inputs = StepInputs(
        **given,
        token_counts=add_input(graph, "token_counts", INT64, ["B"]),
        forced_routes=add_input(graph, "forced_routes", INT64, [len(contract.routed_layers), "B", "S"]),
        is_prompt=add_input(graph, "is_prompt", BOOL, []) if prompts_by_rank else None,
    )
    return Routing.prepare(op, architecture, contract, plan, inputs, target)


def _cache(
    graph: ir.Graph, architecture: Architecture, plan: GraphPlan, contract: AnyContract, target: Target, layer: int
) -> LayerCache:
    slots = _slots(architecture, contract, target, layer)
    shape: list[int | str] = ["B", architecture.kv_heads, slots, target.cache_head_dim(architecture.head_dim)]
    key, value = (
        add_input(graph, f"past_key_values.{layer}.{part}", target.activations, shape) for part in ("key", "value")
    )
    if layer in plan.contiguous or not architecture.needs_key_positions(layer):
        return LayerCache(key, value)
    return LayerCache(key, value, add_input(graph, f"past_key_values.{layer}.position", INT64, ["B", slots]))


def _slots(architecture: Architecture, contract: AnyContract, target: Target, layer: int) -> int | str:
    """A symbol; or how many slots the layer's cache has, slack included, where that stands in the graph."""
    routed = routed_caches(contract, architecture.max_length, padded=target.fixed_slots)
    if routed is None or layer not in routed.layers:
        return architecture.max_length if target.fixed_slots else "M"
    return routed.slots + routed.slack if target.fixed_slots else "M_routed"
