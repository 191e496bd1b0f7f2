"""The manifest's sections on graphs, their inputs and outputs, and the programs that run a phase at a depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dynexport.runtime.bundle.errors import DynexportError

ProfileName = Literal["prefill", "decode"]
Phase = Literal["prompt", "decode"]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
# A number that every language can hold.
Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
ARRAY_TYPES: dict[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
ArrayType = Annotated[str, Field(pattern=f"^({'|'.join(ARRAY_TYPES)})$")]


class Part(BaseModel):
    """Base class of the manifest's sections: unknown fields are errors, and fields are read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(Part):
    """An input or output of a graph.

    Attributes:
        name: name in the ONNX file; docs/bundle.md says what each tensor holds.
        dtype: element type: "float" (32 bits), "float16", "bfloat16", "int8", "int32", "int64" or "bool".
        shape: numbers or symbols. B: batch rows; S: new tokens per row; K: logits per row; N: tokens, flattened over
            rows; C: tokens of one row in the attention of flattened tokens; M: slots of a cache; M_routed: slots of a
            routed layer's cache.
    """

    name: str
    dtype: ArrayType
    shape: tuple[Size | str, ...]

    @property
    def array_type(self) -> type[np.generic]:
        """The numpy type of its arrays; bfloat16, which numpy lacks, is stored as uint16 with the same bits."""
        return ARRAY_TYPES[self.dtype]

    def sized(self, sizes: Mapping[str, int]) -> list[int]:
        """Return its shape with symbols replaced by sizes. Raises DynexportError for a symbol without a size."""
        unknown = [dim for dim in self.shape if isinstance(dim, str) and dim not in sizes]
        if unknown:
            raise DynexportError(f"{self.name:.80}: expected a dimension of {', '.join(sizes)}, found {unknown[0]:.40}")
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]


class Profile(Part):
    """An optimization profile: the sizes that a TensorRT engine is built for.

    Attributes:
        name: "prefill" for prompts, "decode" for one token per row.
        ranges: minimum, optimum and maximum size of each dimension, by its symbol.
    """

    name: ProfileName
    ranges: dict[str, tuple[Size, Size, Size]]


# Prefixes of the names of inputs and outputs that hold a cache; the rest of the name says which cache.
PAST, PRESENT = "past_key_values.", "present."
# The input of a file that several graphs share: the number of the part to run.
PART = "part"


class Graph(Part):
    """One ONNX file, or one part of it.

    Attributes:
        name: the name that programs refer to.
        file: name of its ONNX file in the bundle.
        layers: indices of the model's layers in the graph, ascending: the rows of its input ``layer_active``.
        part: for a file that several graphs share, the value of its scalar input ``part``. A session of the file takes
            inputs that this graph does not list with every symbol 0 and scalars 0, and makes outputs that it does not
            list with every symbol 0. None: a file of its own.
        places: the caches that it reads and writes, ascending: the rows of its input ``cache_lengths``. None: a graph
            that works on one cache per call, of any place; its inputs are ``past_key_values.{part}`` and its outputs
            ``present.{part}``, without a place's number.
        share_memory: whether a session should plan memory reuse between intermediate results. For a graph of thousands
            of nodes the planning time grows with the square of their number and saves nothing.
        profiles: optimization profiles of a TensorRT bundle, in the order that engines of ``dynexport build`` have
            them; empty if any size is accepted.
        inputs: inputs of the ONNX file, bound by name.
        outputs: outputs of the ONNX file, bound by name.
    """

    name: str
    file: str
    layers: tuple[Whole, ...]
    part: Whole | None = None
    places: tuple[Whole, ...] | None
    share_memory: bool = True
    profiles: tuple[Profile, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def caches(self) -> dict[str, TensorSpec]:
        """The inputs that hold a cache, by the part of their names after ``PAST``."""
        return {spec.name.removeprefix(PAST): spec for spec in self.inputs if spec.name.startswith(PAST)}

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """The outputs except caches."""
        return tuple(spec for spec in self.outputs if not spec.name.startswith(PRESENT))

    def takes(self, name: str) -> bool:
        """Return whether the graph has an input of this name."""
        return any(spec.name == name for spec in self.inputs)

    def limit(self, dimension: str) -> int | None:
        """Return the greatest size of a dimension over all profiles; None if any size is accepted."""
        ranges = [profile.ranges.get(dimension) for profile in self.profiles]
        return max((sizes[2] for sizes in ranges if sizes), default=None)


class GraphSet(Part):
    """The graphs of a model in which each token takes a path through a pool of layers; they are called hop by hop.

    Attributes:
        embedding: graph that returns hidden_states and rotary angles.
        routers: names of the graphs that choose each token's layer, one per hop, in the order of hops.
        before_attention: names of the graphs that return query, key and value, one per layer.
        attention: graph that appends to the cache of one place and attends to it.
        after_attention: names of the graphs that run the rest of a layer, one per layer.
        layers: names of the graphs that run a whole layer for one token of each row, one per layer; a runtime may call
            them where all rows chose the same layer. Empty: there are none.
        head: graph that returns logits.
    """

    embedding: str
    routers: tuple[str, ...]
    before_attention: tuple[str, ...]
    attention: str
    after_attention: tuple[str, ...]
    layers: tuple[str, ...] = ()
    head: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the graphs of the set; a name may repeat."""
        ends = (self.embedding, self.attention, self.head)
        return (*ends, *self.routers, *self.before_attention, *self.after_attention, *self.layers)


class Program(Part):
    """The graph, or set of graphs, that runs new tokens in one phase.

    Attributes:
        phase: "prompt" for prompt tokens, "decode" for generated ones.
        depth: name of the depth that it runs. None: every depth; the graph's input ``layer_active``, if it has one,
            selects the layers.
        graph: name of the graph that runs a whole step; None if there is a set.
        set: the graphs that run a step together; None if there is one graph.
    """

    phase: Phase
    depth: str | None = None
    graph: str | None = None
    set: GraphSet | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the graphs that it calls."""
        return self.set.names if self.set else (self.graph,) if self.graph else ()


def by_file(graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """Return the ONNX files, each as one graph: the parts of a file together, under the file's name."""
    found: dict[str, Graph] = {}
    for graph in graphs:
        other = found.get(graph.file)
        found[graph.file] = graph if other is None else _together(other, graph)
    return tuple(found.values())


def check_parts(graphs: Sequence[Graph]) -> None:
    """Raise ValueError where graphs share a file and are not different parts of it."""
    parts: dict[str, set[int | None]] = {}
    for graph in graphs:
        others = parts.setdefault(graph.file, set())
        if others & {graph.part, None} or (others and graph.part is None):
            raise ValueError(f"graphs: {graph.name:.80}: expected a part of its own in a shared file, found none")
        others.add(graph.part)


def _together(first: Graph, second: Graph) -> Graph:
    """Return two parts of a file as one graph."""
    update = {
        "name": first.file.removesuffix(".onnx"),
        "layers": tuple(sorted({*first.layers, *second.layers})),
        "places": None if None in (first.places, second.places) else first.places,
        "inputs": tuple({spec.name: spec for spec in (*first.inputs, *second.inputs)}.values()),
        "outputs": tuple({spec.name: spec for spec in (*first.outputs, *second.outputs)}.values()),
    }
    return first.model_copy(update=update)
