"""Check in a finished graph that routing decisions are causal.

Between the hidden states that enter a layer and the decisions about its tokens, only two kinds of operators are
allowed: those that compute each token separately, and the running sum over earlier tokens. The check leaves out the
layer's attention: the comparison with PyTorch covers it.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import onnx_ir as ir

from dynexport.exporter.graph.structure import ARITHMETIC, COMPARISONS, attribute, broken, integers
from dynexport.exporter.lowering.target import BrokenGraph

_LOGIC = ("And", "Not", "Or", "Where", "Xor")
_ELEMENT_BY_ELEMENT = {*ARITHMETIC, *COMPARISONS, *_LOGIC, "Abs", "Cast", "Identity", "Neg", "Relu", "Sigmoid", "Tanh"}


class _Layout(Enum):
    """The layout of a value computed from hidden states, by its last axis; NONE for a value independent of them."""

    NONE = 0
    FEATURES = 1  # [B, S, features]
    TOKENS = 2  # [1, B, S]


class Decisions:
    """Checks the path from the hidden states that enter a layer to the decisions about its tokens.

    Args:
        entrance: the name of the hidden states that enter the layer.
        given: names of further inputs that decisions may depend on.
        looks_ahead: bool scalar; a value combined with it by And may depend on later tokens. None: no value may.
    """

    def __init__(self, entrance: str, given: Collection[str], looks_ahead: ir.Value | None) -> None:
        self._entrance, self._given, self._looks_ahead = entrance, given, looks_ahead
        self._seen: dict[ir.Value, _Layout] = {}

    def check(self, value: ir.Value) -> _Layout:
        """Return the layout of a value.

        Raises:
            BrokenGraph: if a later token can change the decision about an earlier one, or the decision depends on
                other inputs than the layer's hidden states.
        """
        if value.name == self._entrance:
            return _Layout.FEATURES
        if value not in self._seen:
            self._seen[value] = self._follow(value)
        return self._seen[value]

    def _follow(self, value: ir.Value) -> _Layout:
        node = value.producer()
        if node is None:
            if value.name in self._given or value.is_initializer():
                return _Layout.NONE
            raise BrokenGraph(
                f"{value.name}: expected routes from {self._entrance} alone, found that they use this input"
            )
        operands = [operand for operand in node.inputs if operand is not None]
        may_look = node.op_type == "And" and any(operand is self._looks_ahead for operand in operands)
        if node.op_type == "Shape" or may_look:
            return _Layout.NONE
        layouts = [self.check(operand) for operand in operands]
        if not {*layouts} - {_Layout.NONE}:
            return _Layout.NONE
        layout = _one_by_one(node, layouts)
        if layout is None:
            raise broken(
                node,
                "expected causal routes, found that a later token can change an earlier one's",
            )
        return layout


def _one_by_one(node: ir.Node, layouts: list[_Layout]) -> _Layout | None:
    """Return the result's layout if each element depends on its and earlier tokens of the row only, else None."""
    if node.op_type in _ELEMENT_BY_ELEMENT:
        followed = {*layouts} - {_Layout.NONE}
        return followed.pop() if len(followed) == 1 else None
    if any(layout != _Layout.NONE for layout in layouts[1:]):
        return None
    if layouts[0] == _Layout.TOKENS:
        forward = node.op_type == "CumSum" and not attribute(node, "reverse", 0)
        return _Layout.TOKENS if forward and integers(node.inputs[1]) in ([2], [-1]) else None
    if node.op_type == "RouteTokens":
        return _Layout.TOKENS if layouts[0] == _Layout.FEATURES and _is_weight(node.inputs[1]) else None
    if node.op_type == "Transpose":
        permutation = node.attributes.get("perm")
        return _Layout.TOKENS if permutation is not None and [*permutation.as_ints()] == [2, 0, 1] else None
    turned = any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if node.op_type == "Split":
        return _Layout.FEATURES if attribute(node, "axis", 0) == -1 else None
    over_features = (node.op_type in ("MatMul", "FusedMatMul") and not turned) or (
        node.op_type in ("RMSNormalization", "LayerNormalization") and attribute(node, "axis", -1) == -1
    )
    return _Layout.FEATURES if over_features and _is_weight(node.inputs[1]) else None


def _is_weight(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer of the graph, possibly transposed."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    return value is not None and value.is_initializer()


__all__ = ["Decisions"]
