"""Join products of the CPU operators with the norms, gates and sums around them (docs/plugins.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dynexport.plugins.fused import EPSILON, MATRICES
from dynexport.plugins.schema import DOMAIN

_PRODUCT = "MatMul"
_KINDS = ("Block", "Half")


def fuse(model: ir.Model) -> None:
    """Fuse the graph and its branches: what follows attention in a layer, and norms before a product."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if node.op_type == "SkipSimplifiedLayerNormalization":
                _fuse_after_attention(graph, node)
        for node in list(graph):
            if node.op_type == "RMSNormalization":
                _fuse_norm(graph, node)


@dataclass(frozen=True)
class _Half:
    """The nodes of a layer from the projection of attention on; ``products`` are in the order of MATRICES."""

    norm: ir.Node
    products: tuple[ir.Node, ir.Node, ir.Node, ir.Node]
    activation: ir.Node
    gated: ir.Node
    added: ir.Node

    @classmethod
    def around(cls, norm: ir.Node) -> _Half | None:
        """Return the nodes around a sum of attention and residual that is normed; None where they are others."""
        normed, added = norm.outputs[0], norm.outputs[3]
        o, last = _producer(norm.inputs[1]), _only_user(added)
        branches = [user for user, _ in normed.uses()]
        if o is None or last is None or last.op_type != "Add" or len(branches) != 2 or normed.is_graph_output():
            return None
        for gate, up in (branches, reversed(branches)):
            activation = _only_user(gate.outputs[0])
            gated = None if activation is None else _only_user(activation.outputs[0])
            down = None if gated is None else _only_user(gated.outputs[0])
            if activation is None or gated is None or down is None:
                continue
            half = cls(norm, (o, gate, up, down), activation, gated, last)
            if half._fits():
                return half
        return None

    def _fits(self) -> bool:
        o, gate, up, down = self.products
        kinds = {_kind_of(node) for node in self.products}
        return (
            len(kinds) == 1
            and None not in kinds
            and _is_silu(self.activation)
            and self.gated.op_type == "Mul"
            and {*self.gated.inputs} == {self.activation.outputs[0], up.outputs[0]}
            and {*self.added.inputs} == {self.norm.outputs[3], down.outputs[0]}
            and all(_only_user(node.outputs[0]) is not None for node in (o, up, down))
            and all(node.graph is self.norm.graph for node in (*self.products, self.added))
            and _alike(gate, up)
        )


def _fuse_after_attention(graph: ir.Graph, norm: ir.Node) -> None:
    half = _Half.around(norm)
    if half is None:
        return
    o, gate, _, down = half.products
    attributes = [ir.AttrInt64("hidden", _rows(down)), ir.AttrInt64("inner", _rows(gate))]
    for name, product in zip(MATRICES, half.products, strict=True):
        own = (attribute for attribute in product.attributes.values() if attribute.name != "N")
        attributes += [ir.AttrInt64(f"{name}_{attribute.name}", attribute.as_int()) for attribute in own]
    parts = [part for product in half.products for part in product.inputs[1:]]
    nodes = (norm, *half.products, half.activation, half.gated, half.added)
    inputs = [o.inputs[0], norm.inputs[0], norm.inputs[2], *parts]
    _replace(graph, nodes, f"{_kind_of(o)}AfterAttention", inputs, attributes)


def _fuse_norm(graph: ir.Graph, norm: ir.Node) -> None:
    product = _only_user(norm.outputs[0])
    if product is None or product.graph is not graph or _kind_of(product) is None:
        return
    if product.inputs[0] is not norm.outputs[0] or norm.attributes["axis"].as_int() != -1:
        return
    inputs = [norm.inputs[0], norm.inputs[1], *product.inputs[1:]]
    _replace(graph, (norm, product), f"{_kind_of(product)}NormMatMul", inputs, list(product.attributes.values()))


def _replace(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Sequence[ir.Attr],
) -> None:
    """Put one call in the place of nodes, of which the first is a norm, and the last gives the result."""
    first, last = nodes[0], nodes[-1]
    epsilon = ir.AttrFloat32(EPSILON, first.attributes[EPSILON].as_float())
    made = ir.Node(DOMAIN, operator, inputs, [*attributes, epsilon], name=last.name)
    made.metadata_props.update(last.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, last, nodes, [made], last.outputs, made.outputs)


def _kind_of(node: ir.Node) -> str | None:
    """Return Block or Half for a product of a CPU operator with one matrix, else None."""
    if node.domain != DOMAIN:
        return None
    return next((kind for kind in _KINDS if node.op_type == kind + _PRODUCT), None)


def _is_silu(node: ir.Node) -> bool:
    return node.op_type == "QuickGelu" and node.attributes["alpha"].as_float() == 1


def _alike(gate: ir.Node, up: ir.Node) -> bool:
    """Return whether rows that are rounded for one matrix serve the other."""

    def of(node: ir.Node) -> object:
        stored = node.inputs[1]
        assert stored is not None and stored.shape is not None
        attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
        _, blocks, chunks, *_ = (int(str(size)) for size in stored.shape)
        size = chunks * 32 // attributes["bits"] if "bits" in attributes else chunks
        return stored.dtype, attributes["N"], attributes.get("zero"), blocks, size

    return of(gate) == of(up)


def _rows(product: ir.Node) -> int:
    return product.attributes["N"].as_int()


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _only_user(value: ir.Value) -> ir.Node | None:
    """Return the node that uses a value, if it is the only use."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


__all__ = ["fuse"]
