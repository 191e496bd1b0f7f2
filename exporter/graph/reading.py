"""Read constants and attributes from a graph of a bundle, to compare them with the contract."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator
from fractions import Fraction

import numpy as np
import onnx
import onnx_ir as ir

from dynexport.exporter.graph.structure import COMPARISONS
from dynexport.plugins.fused import unfused
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import Graph

_LAYER = re.compile(r"layers?[._]([0-9]+)")
# Larger tensors are weights; their values are not read.
_LARGEST_CONSTANT = 1 << 16


class GraphFile:
    """One graph of a bundle.

    Attributes:
        entry: the graph's entry in the manifest.
        nodes: all nodes, including those of its branches.
    """

    def __init__(self, bundle: Bundle, entry: Graph) -> None:
        self.entry = entry
        self._graph = unfused(ir.from_proto(onnx.load_from_string(bundle.read(entry.file)))).graph
        self.nodes = list(self._graph.all_nodes())

    @property
    def is_step(self) -> bool:
        """Return whether the graph runs tokens through the model's layers in order."""
        return (
            self.entry.takes("input_ids")
            and self.entry.takes("logits_indices")
            and not self.entry.takes("forced_paths")
        )

    @property
    def only_embeds(self) -> bool:
        """Return whether the graph only embeds tokens."""
        return self.entry.takes("input_ids") and not self.entry.caches

    def of_type(self, *kinds: str) -> Iterator[ir.Node]:
        """Return the nodes with one of these operator types."""
        return (node for node in self.nodes if node.op_type in kinds)

    def value(self, name: str) -> ir.Value | None:
        """Return the graph output or computed value with this name; None if there is none."""
        inside = [value for node in self.nodes for value in node.outputs]
        found: list[ir.Value] = [value for value in (*self._graph.outputs, *inside) if value.name == name]
        return found[0] if found else None

    def constant(self, name: str) -> np.ndarray | None:
        """Return the constant with this name; None if there is none."""
        value = self._graph.initializers.get(name)
        return None if value is None else constant(value)

    def layer_of(self, node: ir.Node) -> int | None:
        """Return the layer of a node, from its name or its graph; None if layers share the node."""
        found = _LAYER.search(node.name or "")
        if found:
            return int(found[1])
        return (
            self.entry.layers[0]
            if self.entry.takes("hidden_states") and len(self.entry.layers) == 1 and not self.entry.caches
            else None
        )

    def where(self, node: ir.Node) -> str:
        """Return a node's location for a message: graph, layer and operator."""
        layer = self.layer_of(node)
        return f"{self.entry.name}: {'' if layer is None else f'layer {layer}: '}{node.op_type}"


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the values of a small constant; None for any other value."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > _LARGEST_CONSTANT else np.asarray(tensor.numpy())


def operands(node: ir.Node) -> list[np.ndarray]:
    """Return the constants among a node's inputs."""
    found = (constant(value) for value in node.inputs)
    return [value for value in found if value is not None]


def behind(
    value: ir.Value | None, stop: Collection[str] = (), *, through: Collection[str] | None = None
) -> Iterator[ir.Node]:
    """Yield the nodes that a value depends on, nearest first.

    Args:
        value: where the search starts.
        stop: operator types whose inputs are not followed.
        through: the only operator types whose inputs are followed; None for all.
    """
    pending, seen = deque([value]), set()
    while pending:
        node = None if (current := pending.popleft()) is None else current.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.op_type not in stop and (through is None or node.op_type in through):
            pending += node.inputs


def number(node: ir.Node, name: str, default: float = 0.0) -> float:
    """Return a numeric attribute, rounded to float32."""
    attribute = node.attributes.get(name)
    return float(np.float32(default if attribute is None else attribute.value))


def text(node: ir.Node, name: str, default: str) -> str:
    """Return a text attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.as_string())


def unequal(where: str, expected: object, found: object) -> Iterator[str]:
    """Yield a message if two values differ."""
    if expected != found:
        yield f"{where}: expected {expected}, found {found}"


def share(share: float, rounding: str) -> tuple[int, int, int]:
    """Return (numerator, added, denominator): the share of n tokens is (numerator * n + added) // denominator."""
    exact = Fraction(str(share))
    return exact.numerator, exact.denominator - 1 if rounding == "ceil" else 0, exact.denominator


def shares(graph: GraphFile) -> Iterator[tuple[int, int, int]]:
    """Yield (numerator, added, denominator) of each max(1, (numerator * tokens + added) / denominator) in a graph."""
    for node in graph.of_type("Max"):
        quotient = node.inputs[0].producer() if node.inputs[0] is not None else None
        if quotient is None or quotient.op_type != "Div" or constant(quotient.inputs[1]) is None:
            continue
        parts = {n.op_type: int(v) for n in behind(quotient.inputs[0], ("Mul",)) for v in operands(n) if v.size == 1}
        yield parts.get("Mul", 1), parts.get("Add", 0), int(operands(quotient)[0])


def shown_values(values: np.ndarray | None) -> str:
    """Return the size and the first four values as text, for messages."""
    if values is None:
        return "none"
    first = ", ".join(f"{value:.6g}" for value in values.reshape(-1)[:4])
    return f"{values.size} from {first}"


__all__ = [
    "COMPARISONS",
    "GraphFile",
    "behind",
    "constant",
    "number",
    "operands",
    "share",
    "shares",
    "shown_values",
    "text",
    "unequal",
]
