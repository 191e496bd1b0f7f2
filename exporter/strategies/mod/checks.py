"""Check that a routed graph has no fixed number of tokens and no decision that depends on later tokens."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.causality import Decisions
from dynexport.exporter.graph.structure import STEP_SHAPES, Sizes, check_dimensions, share_numbers
from dynexport.exporter.strategies.mod.routing import Routing
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.manifest import PAST, PRESENT

_DECIDED_WITH = ("cache_lengths", "token_counts", "forced_routes", "is_prompt", "position_ids")
_SHAPES: Mapping[str, list[str | None]] = {**STEP_SHAPES, "is_prompt": [], "overflow": [None, "B"]}


def check_routed_graph(graph: ir.Graph, architecture: Architecture, routing: Routing) -> None:
    """Check a finished graph; only ``is_prompt`` may enable top-k, which depends on later tokens.

    Args:
        graph: the graph.
        architecture: the model's architecture.
        routing: the graph's routing, with the routes of all routed layers.

    Raises:
        BrokenGraph: for a violation; the message names the node, input or output.
    """
    contract = routing.contract
    fixed_slots = routing.target.fixed_slots
    check_dimensions(graph, lambda name: _dimensions(name, contract, fixed_slots))
    declared = {
        contract.slots(architecture.max_length),
        contract.keep_first,
        *share_numbers(contract.capacity, contract.rounding),
    }
    Sizes(graph, architecture, declared).check_all()
    for number, route in enumerate(routing.routes):
        if contract.level == "sequence":
            break
        layer = routing.layer_of(number)
        entrance = f"hidden_states.{layer - 1 if layer else 'embedding'}"
        Decisions(entrance, _DECIDED_WITH, routing.is_prompt).check(route.chosen)


def _dimensions(name: str, contract: Mod, fixed_slots: bool) -> list[str | None]:
    """Return the dimension symbols of an input or output, None for a fixed size."""
    if name.startswith((PAST, PRESENT)):
        _, layer, part = name.split(".")
        gaps = int(layer) in contract.routed_layers and not contract.all_have_entries
        symbol = "M_routed" if gaps else "M"
        slots = None if fixed_slots else symbol
        return ["B", slots] if part == "position" else ["B", None, slots, None]
    return _SHAPES.get(name, [None, "B", "S"])


__all__ = ["check_routed_graph"]
