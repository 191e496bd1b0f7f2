"""Compare the constants of routed layers in a graph with the contract."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from dynexport.exporter.graph.reading import (
    COMPARISONS,
    GraphFile,
    behind,
    constant,
    number,
    share,
    shares,
    shown_values,
    unequal,
)
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.manifest import Manifest


def route_differences(graph: GraphFile, manifest: Manifest, contract: Mod) -> Iterator[str]:
    """Yield differences in a routed layer's comparison, threshold and cache capacity, and in top-k's share."""
    name, slots = graph.entry.name, contract.slots(manifest.model.max_length)
    routes = _by_layer(graph.value("routes"), contract)
    parts = contract.decisions_per_layer
    for place, chosen in enumerate(routes):
        layer = contract.routed_layers[place // parts]
        decisions, rooms = _found(chosen)
        compared = {">": "Greater", ">=": "GreaterOrEqual"}[contract.decision.comparison]
        expected = [(compared, float(np.float32(contract.threshold(layer))))]
        if contract.decision.rule == "always":
            expected = []
        yield from unequal(f"{name}: layer {layer}: decision", expected, decisions)
        has_room = place % parts == 0 and not contract.all_have_entries
        if rooms or (slots < manifest.model.max_length and has_room):
            yield from unequal(f"{name}: layer {layer}: room", {("LessOrEqual", slots)}, rooms)
    layers: list[int] = np.repeat(contract.routed_layers, parts).tolist()
    thresholds = np.array([contract.threshold(layer) for layer in layers], np.float32)
    found = graph.constant("route_thresholds")
    if found is None or not np.array_equal(found.reshape(-1), thresholds):
        yield f"{name}: thresholds of margins: expected {shown_values(thresholds)}, found {shown_values(found)}"
    if contract.prefill == "topk" and any(spec.name == "is_prompt" for spec in graph.entry.inputs):
        expected_shares = {share(contract.capacity, contract.rounding)}
        yield from unequal(f"{name}: share that top-k chooses", expected_shares, {*shares(graph)})


def _found(chosen: ir.Value | None) -> tuple[list[tuple[str, float]], set[tuple[str, int]]]:
    """Return the comparisons with a probability, and with the room in a cache, that a layer's decisions depend on."""
    decisions, rooms = [], set()
    for node in behind(chosen, (*COMPARISONS, "RouteTokens")):
        if node.op_type == "RouteTokens":
            limit = constant(node.inputs[3])
            compared = "GreaterOrEqual" if number(node, "inclusive") else "Greater"
            decisions.append((compared, math.nan if limit is None else float(limit)))
            rooms |= {("LessOrEqual", size) for size in _rooms(node.inputs[5])}
        if node.op_type not in COMPARISONS:
            continue
        limit = constant(node.inputs[1])
        if limit is not None and _is_probability(node.inputs[0]):
            decisions.append((node.op_type, float(limit)))
        if limit is None:
            rooms |= {(node.op_type, size) for size in _rooms(node.inputs[1])}
    return decisions, rooms


def _is_probability(value: ir.Value | None) -> bool:
    """Return whether a value is a sigmoid's output, with or without the forced decisions added."""
    return any(node.op_type == "Sigmoid" for node in behind(value, through=("Add", "Transpose")))


def _by_layer(routes: ir.Value | None, contract: Mod) -> Sequence[ir.Value | None]:
    """Return the routed layers' values that the graph concatenates into ``routes``."""
    node = None if routes is None else routes.producer()
    if node is not None and node.op_type == "Concat":
        return list(node.inputs)
    return [routes] * (len(contract.routed_layers) * contract.decisions_per_layer)


def _rooms(limit: ir.Value | None) -> set[int]:
    """Return the cache capacities that ``cache_lengths`` are subtracted from."""
    found = (constant(node.inputs[0]) for node in behind(limit, ("Sub", "Shape")) if node.op_type == "Sub")
    return {int(value) for value in found if value is not None and value.size == 1}


__all__ = ["route_differences"]
