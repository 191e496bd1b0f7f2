"""What a routed graph must not hold, looked for in the finished graph, whatever has written it.

A number of tokens. Stock export turns ``k = int(capacity * S)`` into the k of its example, and the graph is right at
that one length. So every operand that sets a size or a place along an axis - k of TopK, ends of Slice, limits of
Range, target shapes, lengths that attention is told - has to come from the inputs of a run; a constant may stand in it
only where its axis cannot be that of tokens. In the integer arithmetic before it, and where integers are compared, only
0, 1 and what contract and model declare may stand. Not seen: a number of tokens that happens to be one of those.

A decision by what is not known yet. From the hidden states that enter a layer to its routes, causally, there may only
be operators that treat every token by itself, and the running sum over earlier ones; ``is_prompt`` alone may let top-k
in. Not looked at: whether the layer's attention is causal, which is the kernel's work and compared with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from fractions import Fraction

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.routing import Routing
from dynexport.runtime.bundle.contract import Mod, Radial
from dynexport.runtime.bundle.manifest import PAST, PRESENT
from dynexport.runtime.execution.decisions import TURNED_AWAY


class BrokenGraph(AssertionError):
    """A bug of the exporter, found before the graph is written."""


# Operand -> constants that may stand in it. Reshape, Expand, Split and Gather have rules of their own.
_SIZES: dict[str, dict[int, frozenset[int]]] = {
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
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")
_NOT_COUNTED = (ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PICKS = ("Gather", "GatherElements", "GatherND")
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGIC = ("And", "Not", "Or", "Where", "Xor")
_ELEMENT_BY_ELEMENT = {*_ARITHMETIC, *_COMPARISONS, *_LOGIC, "Abs", "Cast", "Identity", "Neg", "Sigmoid"}
_OF_VALUES = ("Compress", "If", "Loop", "NonZero", "Scan", "Unique")
_DECIDED_WITH = ("cache_lengths", "token_counts", "forced_routes", "is_prompt")


def check_structure(graph: ir.Graph, architecture: Architecture, routing: Routing) -> None:
    """Look at a finished graph.

    Args:
        routing: with the routes of all routed layers.

    Raises:
        BrokenGraph: with the name of the node, input or output that must not be so.
    """
    contract = routing.contract
    fixed_slots = routing.target.fixed_slots
    _check_dimensions(graph, lambda name: _dimensions(name, contract, fixed_slots))
    declared = {contract.slots(architecture.max_length), *_numbers(contract.capacity, contract.rounding)}
    _Sizes(graph, architecture, declared).check_all()
    for layer, route in zip(routing.contract.routed_layers, routing.routes, strict=True):
        entrance = f"hidden_states.{layer - 1 if layer else 'embedding'}"
        _Decisions(entrance, routing.is_prompt).check(route.chosen)


def check_single_graph(
    graph: ir.Graph, architecture: Architecture, contract: Radial, layer_capacity: float, *, fixed_slots: bool
) -> None:
    """Look at a finished graph of all steps of a Radial Network.

    Raises:
        BrokenGraph: as ``check_structure``; or for an operator that is a condition, or whose result has a shape that
            depends on values.
    """
    _check_dimensions(graph, lambda name: _single_graph_dimensions(name, fixed_slots))
    _check_of_steps(graph, architecture, contract, {TURNED_AWAY, *_numbers(layer_capacity, "ceil")})


def check_decode_graph(graph: ir.Graph, architecture: Architecture, contract: Radial) -> None:
    """Look at a finished graph of all steps of one token of every row, over caches of a fixed size.

    Raises:
        BrokenGraph: as ``check_single_graph``.
    """
    _check_dimensions(graph, _decode_graph_dimensions)
    _check_of_steps(graph, architecture, contract, {-1})


def _check_of_steps(graph: ir.Graph, architecture: Architecture, contract: Radial, declared: set[int]) -> None:
    """Nothing is conditional; and numbers are those of a path, or declared."""
    for node in graph.all_nodes():
        if node.op_type in _OF_VALUES:
            raise _broken(node, "what runs, or a shape, depends on values here")
    choices, steps = range(architecture.layers + 1), range(contract.max_steps)
    _Sizes(graph, architecture, {*choices, *steps} | declared).check_all()


def _numbers(share: float, rounding: str) -> set[int]:
    """What may stand in the arithmetic of a share."""
    exact = Fraction(str(share))
    return {exact.numerator, exact.denominator} | ({exact.denominator - 1} if rounding == "ceil" else set())


def _check_dimensions(graph: ir.Graph, dimensions: Callable[[str], list[str | None]]) -> None:
    """Every input and output has a symbol where a run decides, and a number everywhere else."""
    for value in (*graph.inputs, *graph.outputs):
        expected = dimensions(value.name or "")
        found = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        if len(found) != len(expected) or not all(
            isinstance(dim, int) if symbol is None else dim == symbol
            for dim, symbol in zip(found, expected, strict=True)
        ):
            raise BrokenGraph(f"{value.name}: expected dimensions {expected} (None: a number), found {found}")


def _fixed_slots(graph: ir.Graph) -> set[int]:
    """Of a target whose caches have a fixed size, how many slots they have."""
    shapes = (value.shape for value in graph.inputs if (value.name or "").endswith(".key"))
    return {shape[2] for shape in shapes if shape is not None and isinstance(shape[2], int)}


def _cache_channels(graph: ir.Graph) -> set[int]:
    """Channels of a head in a cache: as many as the model has, or more where the engine wants another multiple."""
    shapes = (value.shape for value in graph.inputs if (value.name or "").endswith(".key"))
    return {shape[3] for shape in shapes if shape is not None and isinstance(shape[3], int)}


def _dimensions(name: str, contract: Mod, fixed_slots: bool) -> list[str | None]:
    """The symbols of an input or output, None for a number."""
    if name.startswith((PAST, PRESENT)):
        _, layer, part = name.split(".")
        symbol = "M_routed" if int(layer) in contract.routed_layers else "M"
        slots = None if fixed_slots else symbol
        return ["B", slots] if part == "position" else ["B", None, slots, None]
    by_name: dict[str, list[str | None]] = {
        "cache_lengths": [None, "B"],
        "input_ids": ["B", "S"],
        "is_prompt": [],
        "logits": ["B", "K", None],
        "logits_indices": ["B", "K"],
        "overflow": [None, "B"],
        "position_ids": ["B", "S"],
        "token_counts": ["B"],
    }
    return by_name.get(name, [None, "B", "S"])


def _single_graph_dimensions(name: str, fixed_slots: bool) -> list[str | None]:
    if name.startswith((PAST, PRESENT)):
        slots = None if fixed_slots else "M"
        return ["B", None, slots, None] if name.endswith((".key", ".value")) else ["B", slots]
    by_name: dict[str, list[str | None]] = {
        "cache_lengths": [None, "B"],
        "input_ids": ["B", "S"],
        "logits": ["B", "K", None],
        "logits_indices": ["B", "K"],
        "overflow": [None, "B"],
        "position_ids": ["B", "S"],
        "token_counts": ["B"],
    }
    return by_name.get(name, [None, "B", "S"])


def _decode_graph_dimensions(name: str) -> list[str | None]:
    """Of a single graph's, tokens of a row and rows of logits are one."""
    return [symbol if symbol == "B" else None for symbol in _single_graph_dimensions(name, fixed_slots=True)]


class _Sizes:
    """Where the sizes of a graph come from.

    Args:
        declared: numbers of contract and model, beside 0 and 1, that may stand in integer arithmetic and comparisons.
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
        # Attention that is written out has heads in front of tokens, and places of a cache behind them.
        self._heads = {a.heads, a.kv_heads} if self._slots else set()
        self._features: set[tuple[int | None, ...]] = {(), (a.hidden_size,)}
        self._features |= {(size,) for size in (self._slots | {a.head_dim} if self._slots else ())}
        padded = _cache_channels(graph) - {a.head_dim}
        for channels in (a.head_dim, *padded):
            for heads in (a.heads, a.kv_heads, *([a.heads + 2 * a.kv_heads] if padded else [])):
                self._features |= {(heads, channels), (heads * channels,)}
        self._declared = {0, 1} | declared
        self._of_the_run = _of_the_run(graph, self._slots)

    def check_all(self) -> None:
        """Refuse the first node whose sizes do not come from the inputs of a run."""
        for node in self._graph.all_nodes():
            self.check(node)

    def check(self, node: ir.Node) -> None:
        """Refuse a node whose sizes do not come from the inputs of a run."""
        if node.op_type in ("Reshape", "Expand"):
            self._check_shape(node)
        elif node.op_type == "Split":
            self._check_split(node)
        elif node.op_type == "Gather":
            self._check_gather(node)
        elif node.op_type in _COMPARISONS:
            self._check_comparison(node)
        for place, fixed in _SIZES.get(node.op_type, {}).items():
            if (node.op_type == "TopK" and _ranks_features(node)) or (node.op_type == "Pad" and _pads_features(node)):
                continue
            if node.op_type == "Range" and place == 1:  # the rotary angles of all positions; the places in a cache
                fixed = fixed | {self._max_length} | self._slots | ({1} if self._one_token else set())
            for size in self._elements(node, node.inputs[place]):
                if size is not None and size not in fixed:
                    raise _broken(node, f"input {place} is the constant {size}: it holds at one number of tokens only")

    def _elements(self, node: ir.Node, value: ir.Value | None) -> list[int | None]:
        """The numbers in a size operand: a constant, or None for one or more that come from a run."""
        if value is None:
            return []
        numbers = _integers(value)
        if numbers is not None:
            return [*numbers]
        producer = value.producer()
        if producer is not None and producer.op_type == "Concat":
            return [number for part in producer.inputs for number in self._elements(node, part)]
        if self._one_token and _measured(value) == [1]:
            return [1]
        if value not in self._of_the_run:
            raise _broken(node, f"{value.name} is computed from constants alone, and a size follows from it")
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
                elif producer.op_type in _ARITHMETIC and not {*(_integers(operand) or [-1])} <= self._declared:
                    raise _broken(
                        producer, f"{operand.name}: not among the contract's numbers, and a size of {node.name} follows"
                    )

    def _check_comparison(self, node: ir.Node) -> None:
        """A rank below a constant is a capacity that was baked in."""
        if any(operand is None or operand.dtype in _NOT_COUNTED for operand in node.inputs):
            return
        for operand in node.inputs:
            for number in self._elements(node, operand):
                if number is not None and number not in self._declared | self._windows:
                    raise _broken(
                        node, f"compares with the constant {number}, which neither contract nor model declare"
                    )

    def _check_shape(self, node: ir.Node) -> None:
        """Tokens are never behind features: constants are the model's features, at the end, heads, or 0, 1 and -1."""
        if node.op_type == "Reshape" and node.inputs[0] not in self._of_the_run:
            return
        sizes = self._elements(node, node.inputs[1])
        start = len(sizes)
        while start and (sizes[start - 1] or 0) > 1:
            start -= 1
        if not {*sizes[:start]} <= {None, -1, 0, 1} | self._heads or tuple(sizes[start:]) not in self._features:
            raise _broken(node, f"its shape {sizes} (None: of the run) has constants that are no features of the model")

    def _check_split(self, node: ir.Node) -> None:
        """Into parts of constant sizes, or into so many equal ones, only what does not count tokens."""
        axis, data = _attribute(node, "axis", 0), node.inputs[0]
        if len(node.inputs) > 1:
            sizes = self._elements(node, node.inputs[1])
            cuts_tokens = axis != -1 and any(size is not None for size in sizes)
        else:
            sizes = [None]
            cuts_tokens = data is None or data.shape is None or not isinstance(data.shape[axis], int)
        if cuts_tokens:
            raise _broken(node, f"cuts what may be tokens into {len(sizes) if sizes != [None] else 'equal'} parts")

    def _check_gather(self, node: ir.Node) -> None:
        data, indices = node.inputs
        assert data is not None and indices is not None
        if data in self._of_the_run and indices not in self._of_the_run:
            axis = _attribute(node, "axis", 0)
            if data.shape is None or not isinstance(data.shape[axis], int):
                raise _broken(node, f"picks the constant places {_integers(indices)} from what may be tokens")


def _of_the_run(graph: ir.Graph, slots: set[int]) -> set[ir.Value]:
    """Values that follow from the graph's inputs, in which sizes that shape inference knows are none.

    The places in a cache of a fixed size are among them: the bundle has it for all runs.
    """
    found = set(graph.inputs)
    for node in graph.all_nodes():
        if node.op_type == "Range" and {*(_integers(node.inputs[1]) or [-1])} <= slots:
            found.update(node.outputs)
        if any(value in found for value in node.inputs) and not (node.op_type == "Shape" and _known(node) is not None):
            found.update(node.outputs)
    return found


def _known(shape: ir.Node) -> list[int] | None:
    """The dimensions that a Shape gives where all are numbers."""
    (value,) = shape.inputs
    if value is None or value.shape is None:
        return None
    dims = value.shape.dims[_attribute(shape, "start", 0) : _attribute(shape, "end", len(value.shape))]
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return numbers if len(numbers) == len(dims) else None


def _measured(value: ir.Value | None) -> list[int] | None:
    """The numbers that a Shape gives, or its only one squeezed; None for any other value."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Squeeze":
        return _measured(node.inputs[0])
    return _known(node) if node is not None and node.op_type == "Shape" else None


class _Layout(Enum):
    """Of what follows from hidden states, by what its last axis counts; NONE for what does not follow."""

    NONE = 0
    FEATURES = 1  # [B, S, features]
    TOKENS = 2  # [1, B, S]


class _Decisions:
    """The way from the hidden states that enter a layer, under the name ``entrance``, to its routes."""

    def __init__(self, entrance: str, is_prompt: ir.Value | None) -> None:
        self._entrance, self._is_prompt = entrance, is_prompt
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
            if value.name in _DECIDED_WITH or value.is_initializer():
                return _Layout.NONE
            raise BrokenGraph(f"{value.name}: routes follow from it, and not from {self._entrance} alone")
        operands = [operand for operand in node.inputs if operand is not None]
        chosen_by_top_k = node.op_type == "And" and any(operand is self._is_prompt for operand in operands)
        if node.op_type == "Shape" or chosen_by_top_k:
            return _Layout.NONE
        layouts = [self.check(operand) for operand in operands]
        if not {*layouts} - {_Layout.NONE}:
            return _Layout.NONE
        layout = _one_by_one(node, layouts)
        if layout is None:
            raise _broken(node, "a token may decide about an earlier one here, on the way to the routes")
        return layout


def _one_by_one(node: ir.Node, layouts: list[_Layout]) -> _Layout | None:
    """The layout of results that follow, each, from that token and from earlier ones of its row; None for others."""
    if node.op_type in _ELEMENT_BY_ELEMENT:
        followed = {*layouts} - {_Layout.NONE}
        return followed.pop() if len(followed) == 1 else None
    if any(layout != _Layout.NONE for layout in layouts[1:]):
        return None
    if layouts[0] == _Layout.TOKENS:
        forward = node.op_type == "CumSum" and not _attribute(node, "reverse", 0)
        return _Layout.TOKENS if forward and _integers(node.inputs[1]) in ([2], [-1]) else None
    if node.op_type == "Transpose":
        permutation = node.attributes.get("perm")
        return _Layout.TOKENS if permutation is not None and [*permutation.as_ints()] == [2, 0, 1] else None
    turned = any(_attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    over_features = (node.op_type in ("MatMul", "FusedMatMul") and not turned) or (
        node.op_type in ("RMSNormalization", "LayerNormalization") and _attribute(node, "axis", -1) == -1
    )
    return _Layout.FEATURES if over_features and _is_weight(node.inputs[1]) else None


def _is_weight(value: ir.Value | None) -> bool:
    """Of the graph itself, as it is or transposed."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    return value is not None and value.is_initializer()


def _ranks_features(node: ir.Node) -> bool:
    """Whether a TopK chooses along an axis of a size that is not one of the run's: of a router's scores."""
    ranked, axis = node.inputs[0], node.attributes.get("axis")
    if ranked is None or ranked.shape is None:
        return False
    return isinstance(ranked.shape[-1 if axis is None else axis.as_int()], int)


def _pads_features(node: ir.Node) -> bool:
    """Whether a Pad adds to the last axis alone, which never counts tokens."""
    return len(node.inputs) > 3 and _integers(node.inputs[3]) == [-1]


def _integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant; None for any other value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _broken(node: ir.Node, problem: str) -> BrokenGraph:
    return BrokenGraph(f"{node.name} ({node.op_type}): {problem}")


__all__ = ["BrokenGraph", "check_decode_graph", "check_single_graph", "check_structure"]
