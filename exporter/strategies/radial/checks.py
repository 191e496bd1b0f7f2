"""Check that a graph with all hops of a Radial Network has no condition and no fixed number of tokens."""

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
    """Check a finished graph with all hops.

    Raises:
        BrokenGraph: for a violation; the message names the node, input or output.
    """
    check_dimensions(graph, lambda name: _dimensions(name, fixed_slots))
    _check_of_steps(graph, architecture, contract, {TURNED_AWAY, *share_numbers(layer_capacity, "ceil")})


def check_decode_graph(graph: ir.Graph, architecture: Architecture, contract: Radial) -> None:
    """Check a finished decode graph: all hops of one token per row, with caches of a fixed size.

    Raises:
        BrokenGraph: as ``check_single_graph``.
    """
    check_dimensions(graph, _decode_dimensions)
    _check_of_steps(graph, architecture, contract, {-1})


def _check_of_steps(graph: ir.Graph, architecture: Architecture, contract: Radial, declared: set[int]) -> None:
    """Check that nothing is conditional and that every number is a choice, a hop or a declared one."""
    check_unconditional(graph)
    choices, steps = range(architecture.layers + 1), range(contract.max_steps)
    Sizes(graph, architecture, {*choices, *steps} | declared).check_all()


def _dimensions(name: str, fixed_slots: bool) -> list[str | None]:
    """Return the dimension symbols of an input or output, None for a fixed size."""
    if name.startswith((PAST, PRESENT)):
        slots = None if fixed_slots else "M"
        return ["B", None, slots, None] if name.endswith((".key", ".value")) else ["B", slots]
    return _SHAPES.get(name, [None, "B", "S"])


def _decode_dimensions(name: str) -> list[str | None]:
    """Return the dimension symbols for a decode graph, where a row has one token and one row of logits."""
    return [symbol if symbol == "B" else None for symbol in _dimensions(name, fixed_slots=True)]


__all__ = ["check_decode_graph", "check_single_graph"]
