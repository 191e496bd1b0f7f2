"""Comparison of the rotary angles in a bundle's graphs with its config, and of both with transformers' module."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.graph.reading import GraphFile, behind, constant, number, operands, shown_values, unequal

Difference = str
_TABLES = {"CachedAttention": (5, 6), "GroupQueryAttention": (7, 8), "RotaryEmbedding": (1, 2)}
# Absolute limit of cos and sin, plus two units in the last place of the frequency per position.
_ANGLE_LIMIT, _BIT = 1e-3, 2.0**-22


def rotary_differences(graph: GraphFile, architecture: Architecture) -> Iterator[Difference]:
    """Check the rotary frequencies of every layer and the set of layers with rotary positions."""
    rotated: set[int | None] = set()
    for node in graph.of_type(*_TABLES):
        if not _rotates(node):
            continue
        rotated.add(graph.layer_of(node))
        for kind, place in zip(("Cos", "Sin"), _TABLES[node.op_type], strict=True):
            yield from _angles(
                graph.where(node), node.inputs[place], kind, _rotary_of(architecture, graph.layer_of(node))
            )
        yield from unequal(f"{graph.where(node)}: interleaved", 0.0, number(node, "interleaved"))
        yield from unequal(f"{graph.where(node)}: interleaved", 0.0, number(node, "rotary_interleaved"))
    if graph.only_embeds and isinstance(architecture.positions, Rotary):
        for kind in ("Cos", "Sin"):
            yield from _angles(graph.entry.name, graph.value(kind.lower()), kind, architecture.positions)
    if graph.is_step or graph.value("query") is not None:
        turning = (layer for layer in graph.entry.layers if architecture.rotary_layers[layer])
        layers = {layer for layer in turning if architecture.sizes_of(layer).heads}
        yield from unequal(f"{graph.entry.name}: layers with rotary positions", layers, rotated)


def angles_of_places(
    positions: Rotary, places: list[int], known: tuple[np.ndarray, np.ndarray] | None
) -> list[Difference]:
    """Return where rotary angles differ from transformers', the first place of cos and that of sin."""
    if known is None:
        return ["expected a module for rotary positions in transformers' model, found none"]
    angles = np.multiply.outer(np.array(places, np.float32), np.asarray(positions.inverse_frequencies, np.float32))
    limits = _ANGLE_LIMIT + np.array(places)[:, None] * _BIT
    found: list[Difference] = []
    for name, expected, turned in zip(("cos", "sin"), known, (np.cos(angles), np.sin(angles)), strict=True):
        own = turned * np.float32(positions.attention_factor)
        if own.shape != expected.shape:
            return [f"{name}: expected {expected.shape[1]} channels as transformers has, found {own.shape[1]}"]
        for place, channel in np.argwhere(np.abs(own - expected) > limits)[:1]:
            found.append(
                f"{name} of position {places[place]}, channel {channel}: expected {expected[place, channel]:.6g} as "
                f"transformers has, found {own[place, channel]:.6g}"
            )
    return found


def same(expected: np.ndarray | None, found: np.ndarray | None) -> bool:
    """Return whether two arrays, or the lack of one, are the same."""
    if expected is None or found is None:
        return expected is found
    return np.array_equal(expected, found)


def _rotates(node: ir.Node) -> bool:
    """Return whether an operator that may rotate does."""
    if node.op_type == "GroupQueryAttention":
        return bool(number(node, "do_rotary"))
    table = constant(node.inputs[_TABLES[node.op_type][0]])
    return table is None or table.size > 0


def _rotary_of(architecture: Architecture, layer: int | None) -> Rotary | None:
    """Return the rotary positions of a layer, also of one that must not rotate; those of the model without a layer."""
    positions = architecture.positions if layer is None else architecture.rotary_of(layer) or architecture.positions
    return positions if isinstance(positions, Rotary) else None


def _angles(where: str, value: ir.Value | None, kind: str, positions: Rotary | None) -> Iterator[Difference]:
    """Check cos or sin of positions times frequencies; an input from another graph is checked in that graph."""
    if value is not None and value.producer() is None and value.name == kind.lower():
        return
    turn = next((node for node in behind(value, ("Cos", "Sin")) if node.op_type in ("Cos", "Sin")), None)
    yield from unequal(f"{where}: angles", kind, None if turn is None else turn.op_type)
    if turn is None:
        return
    found = [v.reshape(-1) for node in behind(turn.inputs[0], ("Unsqueeze",)) for v in operands(node) if v.size > 1]
    expected = None
    if positions is not None:
        expected = np.asarray(positions.inverse_frequencies, np.float32)
    frequencies = found[0] if found else np.ones(1, np.float32)
    if not same(expected, frequencies):
        yield f"{where}: rotary frequencies: expected {shown_values(expected)}, found {shown_values(frequencies)}"
    factor = 1.0 if positions is None else positions.attention_factor
    yield from unequal(f"{where}: factor of angles", {float(np.float32(factor))} - {1.0}, _factors(value))


def _factors(angles: ir.Value | None) -> set[float]:
    """Return the factors of cos or sin except 1; Where selects another factor for single layers."""
    found: set[float] = set()
    while angles is not None and (node := angles.producer()) is not None and node.op_type not in ("Cos", "Sin"):
        for factor in node.inputs[1:] if node.op_type == "Mul" else ():
            numbers = [constant(factor)]
            for choice in behind(factor, ("Where",)):
                numbers += operands(choice)
            found |= {float(v) for value in numbers if value is not None for v in value.reshape(-1)}
        angles = node.inputs[0]
    return found - {1.0}


__all__ = ["angles_of_places", "rotary_differences", "same"]
