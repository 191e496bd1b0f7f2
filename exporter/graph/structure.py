"""Check that all sizes in a finished graph are computed from the inputs of the call.

torch.onnx.export turns ``k = int(capacity * S)`` into the k of its example, and the graph is right at that one length.
So each operand that sets a size or an index along an axis (k of TopK, ends of Slice, limits of Range, target shapes,
lengths for attention) must be computed from the inputs of the call. A constant is allowed only if the axis cannot be
the token axis. The integer arithmetic and comparisons before such an operand may use only 0, 1 and the numbers that
contract and model declare. The check misses a baked-in number of tokens that equals one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.lowering.target import BrokenGraph

# Operator -> input index -> allowed constants. Reshape, Expand, Split and Gather have separate rules.
_SIZES: dict[str, dict[int, frozenset[int]]] = {
    "CachedAttention": {3: frozenset(), 4: frozenset()},
    "CapacityTopK": {1: frozenset()},
    "ConstantOfShape": {0: frozenset({1})},
    "GroupQueryAttention": {5: frozenset(), 6: frozenset()},
    "Pad": {1: frozenset({0})},
    "Range": {0: frozenset({0}), 1: frozenset()},
    "Slice": {1: frozenset({0}), 2: frozenset()},
    "TensorScatter": {2: frozenset()},
    "Tile": {1: frozenset({1})},
    "TopK": {1: frozenset()},
}
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")
_NOT_COUNTED = (ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PICKS = ("Gather", "GatherElements", "GatherND")
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_OF_VALUES = ("Compress", "If", "Loop", "NonZero", "Scan", "Unique")
# Dimensions of the inputs and outputs of a whole step: a symbol, or None for a number.
STEP_SHAPES: Mapping[str, list[str | None]] = {
    "cache_lengths": [None, "B"],
    "input_ids": ["B", "S"],
    "logits": ["B", "K", None],
    "logits_indices": ["B", "K"],
    "position_ids": ["B", "S"],
    "token_counts": ["B"],
}


def share_numbers(share: float, rounding: str) -> set[int]:
    """Return the constants that the arithmetic of a share may use."""
    exact = Fraction(str(share))
    return {exact.numerator, exact.denominator} | ({exact.denominator - 1} if rounding == "ceil" else set())


def check_dimensions(graph: ir.Graph, dimensions: Callable[[str], list[str | None]]) -> None:
    """Raise BrokenGraph unless every input and output has the expected dimensions: symbols and numbers."""
    for value in (*graph.inputs, *graph.outputs):
        expected = dimensions(value.name or "")
        found = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        if len(found) != len(expected) or not all(
            isinstance(dim, int) if symbol is None else dim == symbol
            for dim, symbol in zip(found, expected, strict=True)
        ):
            raise BrokenGraph(f"{value.name}: expected dimensions {expected} (None: a number), found {found}")


def check_unconditional(graph: ir.Graph) -> None:
    """Raise BrokenGraph for control flow and for operators whose output shape depends on values."""
    for node in graph.all_nodes():
        if node.op_type in _OF_VALUES:
            raise broken(node, "expected fixed control flow and shapes, found one that depends on values")


class Sizes:
    """Checks that the sizes of a graph are computed from the inputs of the call.

    Args:
        graph: the finished graph.
        architecture: the model's architecture.
        declared: numbers of contract and model that integer arithmetic and comparisons may use, besides 0 and 1.
    """

    def __init__(self, graph: ir.Graph, architecture: Architecture, declared: set[int]) -> None:
        a = architecture
        self._graph = graph
        self._max_length = a.max_length
        self._slots = _fixed_slots(graph)
        self._one_token = any(
            value.name == "input_ids" and value.shape and value.shape[1] == 1 for value in graph.inputs
        )
        self._windows = {-window for window in a.windows if window is not None}
        # Attention composed of primitive operators has the axes heads, tokens, cache slots, in this order.
        shapes = {(own.heads, own.kv_heads) for own in map(a.sizes_of, range(a.layers)) if own.heads}
        self._heads = {heads for shape in shapes for heads in shape} if self._slots else set()
        self._features: set[tuple[int | None, ...]] = {(), (a.hidden_size,)}
        self._features |= {(size,) for size in (self._slots | {a.head_dim} if self._slots else ())}
        padded = _cache_channels(graph) - {a.head_dim}
        for channels in (a.head_dim, *padded):
            for heads in {count for own, kv in shapes for count in (own, kv, own + 2 * kv)}:
                self._features |= {(heads, channels), (heads * channels,)}
        if a.experts is not None:
            self._features |= {(a.experts.count,), (a.experts.intermediate_size, 2)}
        self._declared = {0, 1} | declared
        self._of_the_run = _of_the_run(graph, self._slots)

    def check_all(self) -> None:
        """Raise BrokenGraph for the first node whose sizes are not computed from the inputs of the call."""
        for node in self._graph.all_nodes():
            self.check(node)

    def check(self, node: ir.Node) -> None:
        """Raise BrokenGraph if a node's sizes are not computed from the inputs of the call."""
        if node.op_type in ("Reshape", "Expand"):
            self._check_shape(node)
        elif node.op_type == "Split":
            self._check_split(node)
        elif node.op_type == "Gather":
            self._check_gather(node)
        elif node.op_type in COMPARISONS:
            self._check_comparison(node)
        for place, fixed in _SIZES.get(node.op_type, {}).items():
            if (node.op_type == "TopK" and _ranks_features(node)) or (node.op_type == "Pad" and _pads_features(node)):
                continue
            if node.op_type == "Range" and place == 1:  # rotary angles of all positions, or cache slots
                fixed = fixed | {self._max_length} | self._slots | ({1} if self._one_token else set())
            for size in self._elements(node, node.inputs[place]):
                if size is not None and size not in fixed:
                    raise broken(node, f"input {place} is the constant {size}: it holds at one number of tokens only")

    def _elements(self, node: ir.Node, value: ir.Value | None) -> list[int | None]:
        """Return the elements of a size operand; None stands for elements computed in the call."""
        if value is None:
            return []
        numbers = integers(value)
        if numbers is not None:
            return [*numbers]
        producer = value.producer()
        if producer is not None and producer.op_type == "Concat":
            return [number for part in producer.inputs for number in self._elements(node, part)]
        if self._one_token and _measured(value) == [1]:
            return [1]
        if value not in self._of_the_run:
            raise broken(node, f"{value.name} is computed from constants alone, and a size follows from it")
        self._check_arithmetic(node, value)
        return [None]

    def _check_arithmetic(self, node: ir.Node, size: ir.Value) -> None:
        pending, seen = [size], set()
        while pending:
            value = pending.pop()
            producer = value.producer()
            if value in seen or producer is None or producer.op_type == "Shape" or value.dtype in _NOT_COUNTED:
                continue
            seen.add(value)
            for operand in producer.inputs[: 1 if producer.op_type in _PICKS else None]:
                if operand is None:
                    continue
                if operand in self._of_the_run:
                    pending.append(operand)
                elif producer.op_type in ARITHMETIC and not {*(integers(operand) or [-1])} <= self._declared:
                    raise broken(
                        producer, f"{operand.name}: not among the contract's numbers, and a size of {node.name} follows"
                    )

    def _check_comparison(self, node: ir.Node) -> None:
        """Raise BrokenGraph for an undeclared constant in a comparison: it may be a baked-in capacity."""
        if any(operand is None or operand.dtype in _NOT_COUNTED for operand in node.inputs):
            return
        for operand in node.inputs:
            for number in self._elements(node, operand):
                if number is not None and number not in self._declared | self._windows:
                    raise broken(node, f"compares with the constant {number}, which neither contract nor model declare")

    def _check_shape(self, node: ir.Node) -> None:
        """Check a target shape: its last constants are feature sizes, the others heads, 0, 1 or -1."""
        if node.op_type == "Reshape" and node.inputs[0] not in self._of_the_run:
            return
        sizes = self._elements(node, node.inputs[1])
        start = len(sizes)
        while start and (sizes[start - 1] or 0) > 1:
            start -= 1
        if not {*sizes[:start]} <= {None, -1, 0, 1} | self._heads or tuple(sizes[start:]) not in self._features:
            raise broken(node, f"its shape {sizes} (None: of the run) has constants that are no features of the model")

    def _check_split(self, node: ir.Node) -> None:
        """Check that a Split into constant or equal parts does not cut the token axis."""
        axis, data = attribute(node, "axis", 0), node.inputs[0]
        if len(node.inputs) > 1:
            sizes = self._elements(node, node.inputs[1])
            cuts_tokens = axis != -1 and any(size is not None for size in sizes)
        else:
            sizes = [None]
            cuts_tokens = data is None or data.shape is None or not isinstance(data.shape[axis], int)
        if cuts_tokens:
            raise broken(node, f"cuts what may be tokens into {len(sizes) if sizes != [None] else 'equal'} parts")

    def _check_gather(self, node: ir.Node) -> None:
        data, indices = node.inputs
        assert data is not None and indices is not None
        if data in self._of_the_run and indices not in self._of_the_run:
            axis = attribute(node, "axis", 0)
            if data.shape is None or not isinstance(data.shape[axis], int):
                raise broken(node, f"picks the constant places {integers(indices)} from what may be tokens")


def _of_the_run(graph: ir.Graph, slots: set[int]) -> set[ir.Value]:
    """Return the values computed from the graph's inputs; a Shape of known dimensions counts as a constant.

    The slot indices of a cache of fixed size count as such values: the bundle has one size for all calls.
    """
    found = set(graph.inputs)
    for node in graph.all_nodes():
        if node.op_type == "Range" and {*(integers(node.inputs[1]) or [-1])} <= slots:
            found.update(node.outputs)
        if any(value in found for value in node.inputs) and not (node.op_type == "Shape" and _known(node) is not None):
            found.update(node.outputs)
    return found


def _known(shape: ir.Node) -> list[int] | None:
    """Return the dimensions that a Shape node outputs if all are numbers, else None."""
    (value,) = shape.inputs
    if value is None or value.shape is None:
        return None
    dims = value.shape.dims[attribute(shape, "start", 0) : attribute(shape, "end", len(value.shape))]
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return numbers if len(numbers) == len(dims) else None


def _measured(value: ir.Value | None) -> list[int] | None:
    """Return the known output of a Shape node, possibly squeezed; None for any other value."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Squeeze":
        return _measured(node.inputs[0])
    return _known(node) if node is not None and node.op_type == "Shape" else None


def _fixed_slots(graph: ir.Graph) -> set[int]:
    """Return the numbers of slots of caches with a fixed size; empty for a symbolic size."""
    shapes = (value.shape for value in graph.inputs if (value.name or "").endswith(".key"))
    return {shape[2] for shape in shapes if shape is not None and isinstance(shape[2], int)}


def _cache_channels(graph: ir.Graph) -> set[int]:
    """Return the channels per head of the caches: head_dim, or more if the engine pads it."""
    shapes = (value.shape for value in graph.inputs if (value.name or "").endswith(".key"))
    return {shape[3] for shape in shapes if shape is not None and isinstance(shape[3], int)}


def _ranks_features(node: ir.Node) -> bool:
    """Return whether a TopK ranks along an axis of constant size, such as a router's scores."""
    ranked, axis = node.inputs[0], node.attributes.get("axis")
    if ranked is None or ranked.shape is None:
        return False
    return isinstance(ranked.shape[-1 if axis is None else axis.as_int()], int)


def _pads_features(node: ir.Node) -> bool:
    """Return whether a Pad pads the last axis alone, which is never the token axis."""
    return len(node.inputs) > 3 and integers(node.inputs[3]) == [-1]


def integers(value: ir.Value | None) -> list[int] | None:
    """Return the values of a constant as integers; None for any other value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def broken(node: ir.Node, problem: str) -> BrokenGraph:
    """Return an error that names the node."""
    return BrokenGraph(f"{node.name} ({node.op_type}): {problem}")


__all__ = [
    "ARITHMETIC",
    "COMPARISONS",
    "STEP_SHAPES",
    "Sizes",
    "check_dimensions",
    "check_unconditional",
    "share_numbers",
]
