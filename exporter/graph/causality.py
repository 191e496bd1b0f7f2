"""Whether decisions about tokens look ahead, in a finished graph, whatever has written it.

From the hidden states that enter a layer to a decision about its tokens, causally, there may only be operators that
treat every token by itself, and the running sum over earlier ones. Not looked at: whether the layer's attention is
causal, which is the kernel's work and compared with PyTorch.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import onnx_ir as ir

from dynexport.exporter.graph.structure import ARITHMETIC, COMPARISONS, attribute, broken, integers
from dynexport.exporter.lowering.target import BrokenGraph

_LOGIC = ("And", "Not", "Or", "Where", "Xor")
_ELEMENT_BY_ELEMENT = {*ARITHMETIC, *COMPARISONS, *_LOGIC, "Abs", "Cast", "Identity", "Neg", "Sigmoid"}


class _Layout(Enum):
    """Of what follows from hidden states, by what its last axis counts; NONE for what does not follow."""

    NONE = 0
    FEATURES = 1  # [B, S, features]
    TOKENS = 2  # [1, B, S]


class Decisions:
    """The way from the hidden states that enter a layer to the decisions about its tokens.

    Args:
        entrance: the name of those hidden states.
        given: names of inputs that decisions may follow from.
        looks_ahead: bool scalar; what is joined to it by And may follow from later tokens. None: nothing may.
    """

    def __init__(self, entrance: str, given: Collection[str], looks_ahead: ir.Value | None) -> None:
        self._entrance, self._given, self._looks_ahead = entrance, given, looks_ahead
        self._seen: dict[ir.Value, _Layout] = {}

    def check(self, value: ir.Value) -> _Layout:
        """Refuse what could let a token decide about an earlier one, or what follows from more than the entrance."""
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
            raise BrokenGraph(f"{value.name}: routes follow from it, and not from {self._entrance} alone")
        operands = [operand for operand in node.inputs if operand is not None]
        may_look = node.op_type == "And" and any(operand is self._looks_ahead for operand in operands)
        if node.op_type == "Shape" or may_look:
            return _Layout.NONE
        layouts = [self.check(operand) for operand in operands]
        if not {*layouts} - {_Layout.NONE}:
            return _Layout.NONE
        layout = _one_by_one(node, layouts)
        if layout is None:
            raise broken(node, "a token may decide about an earlier one here, on the way to the routes")
        return layout


def _one_by_one(node: ir.Node, layouts: list[_Layout]) -> _Layout | None:
    """The layout of results that follow, each, from that token and from earlier ones of its row; None for others."""
    if node.op_type in _ELEMENT_BY_ELEMENT:
        followed = {*layouts} - {_Layout.NONE}
        return followed.pop() if len(followed) == 1 else None
    if any(layout != _Layout.NONE for layout in layouts[1:]):
        return None
    if layouts[0] == _Layout.TOKENS:
        forward = node.op_type == "CumSum" and not attribute(node, "reverse", 0)
        return _Layout.TOKENS if forward and integers(node.inputs[1]) in ([2], [-1]) else None
    if node.op_type == "Transpose":
        permutation = node.attributes.get("perm")
        return _Layout.TOKENS if permutation is not None and [*permutation.as_ints()] == [2, 0, 1] else None
    turned = any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    over_features = (node.op_type in ("MatMul", "FusedMatMul") and not turned) or (
        node.op_type in ("RMSNormalization", "LayerNormalization") and attribute(node, "axis", -1) == -1
    )
    return _Layout.FEATURES if over_features and _is_weight(node.inputs[1]) else None


def _is_weight(value: ir.Value | None) -> bool:
    """Of the graph itself, as it is or transposed."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    return value is not None and value.is_initializer()


__all__ = ["Decisions"]
