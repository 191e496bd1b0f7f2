"""What a graph of all steps of a Radial Network must not hold: a condition, or a number of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.structure import (
    STEP_SHAPES,
    Sizes,
    check_dimensions,
    check_unconditional,
    share_numbers,
)
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import PAST, PRESENT
from dynexport.runtime.execution.decisions import TURNED_AWAY

_SHAPES: Mapping[str, list[str | None]] = {**STEP_SHAPES, "overflow": [None, "B"]}


def check_single_graph(
    graph: ir.Graph, architecture: Architecture, contract: Radial, layer_capacity: float, *, fixed_slots: bool
) -> None:
    """Look at a finished graph of all steps.

    Raises:
        BrokenGraph: with the name of the node, input or output that must not be so.
    """
    check_dimensions(graph, lambda name: _dimensions(name, fixed_slots))
    _check_of_steps(graph, architecture, contract, {TURNED_AWAY, *share_numbers(layer_capacity, "ceil")})


def check_decode_graph(graph: ir.Graph, architecture: Architecture, contract: Radial) -> None:
    """Look at a finished graph of all steps of one token of every row, over caches of a fixed size.

    Raises:
        BrokenGraph: as ``check_single_graph``.
    """
    check_dimensions(graph, _decode_dimensions)
    _check_of_steps(graph, architecture, contract, {-1})


def _check_of_steps(graph: ir.Graph, architecture: Architecture, contract: Radial, declared: set[int]) -> None:
    """Nothing is conditional; and numbers are those of a path, or declared."""
    check_unconditional(graph)
    choices, steps = range(architecture.layers + 1), range(contract.max_steps)
    Sizes(graph, architecture, {*choices, *steps} | declared).check_all()


def _dimensions(name: str, fixed_slots: bool) -> list[str | None]:
    """The symbols of an input or output, None for a number."""
    if name.startswith((PAST, PRESENT)):
        slots = None if fixed_slots else "M"
        return ["B", None, slots, None] if name.endswith((".key", ".value")) else ["B", slots]
    return _SHAPES.get(name, [None, "B", "S"])


def _decode_dimensions(name: str) -> list[str | None]:
    """Of a single graph's, tokens of a row and rows of logits are one."""
    return [symbol if symbol == "B" else None for symbol in _dimensions(name, fixed_slots=True)]


__all__ = ["check_decode_graph", "check_single_graph"]
