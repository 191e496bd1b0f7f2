"""The graphs of a bundle, in its manifest: their inputs and outputs, and which of them run a phase at a depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dynexport.runtime.bundle.errors import DynexportError

ProfileName = Literal["prefill", "decode"]
Phase = Literal["prompt", "decode"]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
ARRAY_TYPES: dict[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
ArrayType = Annotated[str, Field(pattern=f"^({'|'.join(ARRAY_TYPES)})$")]


class Part(BaseModel):
    """A part of the manifest: no fields but its own, and none that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(Part):
    """An input or output of a graph.

    Attributes:
        name: as in the ONNX file; docs/bundle.md says what each holds.
        dtype: of its elements: "float" (32 bits), "float16", "bfloat16", "int32", "int64" or "bool".
        shape: numbers, or symbols: B rows, S new tokens a row, K logits a row, N tokens in a line, C tokens of one row
            in a line's attention, M slots of a cache, M_routed slots of the cache of a layer that chooses its tokens.
    """

    name: str
    dtype: ArrayType
    shape: tuple[int | str, ...]

    @property
    def array_type(self) -> type[np.generic]:
        """What its arrays hold; bfloat16, which numpy lacks, as the same 16 bits."""
        return ARRAY_TYPES[self.dtype]

    def sized(self, sizes: Mapping[str, int]) -> list[int]:
        """Its shape with symbols replaced. Raises DynexportError for a symbol that has no size."""
        unknown = [dim for dim in self.shape if isinstance(dim, str) and dim not in sizes]
        if unknown:
            raise DynexportError(f"{self.name:.80}: expected a dimension of {', '.join(sizes)}, found {unknown[0]:.40}")
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]


class Profile(Part):
    """An optimization profile: the sizes that an engine is built for.

    Attributes:
        name: what it is for: "prefill" for prompts, "decode" for one token a row.
        ranges: symbol of a dimension -> least, usual and greatest size.
    """

    name: ProfileName
    ranges: dict[str, tuple[Size, Size, Size]]


# What the inputs and outputs that hold a cache begin with; the rest of the name says which cache it is.
PAST, PRESENT = "past_key_values.", "present."


class Graph(Part):
    """One ONNX file.

    Attributes:
        name: what programs call it by.
        file: its file in the bundle.
        layers: the model's layers that it holds, ascending: the rows of its input ``layer_active``.
        places: the caches that it reads and writes, ascending: the rows of its input ``cache_lengths``. None: the one
            cache that a call is for, of any place; its inputs are ``past_key_values.{part}``, its outputs
            ``present.{part}``, without the place's number.
        share_memory: whether a session should plan which results share memory. Of a graph of thousands of nodes the
            plan takes time that grows with the square of their number, and saves nothing.
        profiles: of a TensorRT bundle, the sizes that engines are built for, in the order in which the engines of
            ``dynexport build`` have them; none where any size is taken.
        inputs: of the ONNX file, bound by their names.
        outputs: of the ONNX file, bound by their names.
    """

    name: str
    file: str
    layers: tuple[int, ...]
    places: tuple[int, ...] | None
    share_memory: bool = True
    profiles: tuple[Profile, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def caches(self) -> dict[str, TensorSpec]:
        """The inputs that hold a cache, by what follows ``PAST`` in their names."""
        return {spec.name.removeprefix(PAST): spec for spec in self.inputs if spec.name.startswith(PAST)}

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """The outputs that hold no cache."""
        return tuple(spec for spec in self.outputs if not spec.name.startswith(PRESENT))

    def takes(self, name: str) -> bool:
        """Return whether it has an input of this name."""
        return any(spec.name == name for spec in self.inputs)

    def limit(self, dimension: str) -> int | None:
        """Return the greatest size of a dimension that an engine is built for; None where any size is taken."""
        ranges = [profile.ranges.get(dimension) for profile in self.profiles]
        return max((sizes[2] for sizes in ranges if sizes), default=None)


class GraphSet(Part):
    """Graphs that are called in turn, once a hop, where each token takes a path through a pool of layers.

    Attributes:
        embedding: the graph that gives hidden states, and rotary angles.
        routers: the graph that chooses a token's layer, one name for every hop, in the order of hops.
        before_attention: the part of every layer that gives query, key and value, by the layer's index.
        attention: the graph that appends to the cache of one place and attends to it.
        after_attention: the rest of every layer, by its index.
        head: the graph that gives logits.
    """

    embedding: str
    routers: tuple[str, ...]
    before_attention: tuple[str, ...]
    attention: str
    after_attention: tuple[str, ...]
    head: str

    @property
    def names(self) -> tuple[str, ...]:
        """The graphs of the set, some more than once."""
        ends = (self.embedding, self.attention, self.head)
        return (*ends, *self.routers, *self.before_attention, *self.after_attention)


class Program(Part):
    """What runs new tokens: one graph, or a set of them.

    Attributes:
        phase: "prompt" for tokens that were given, "decode" for generated ones.
        depth: the name of the depth that it runs; None: every depth, told by ``layer_active`` where the graph has that
            input.
        graph: the graph that is the whole step; None where there is a set.
        set: the graphs that make a step together; None where there is one graph.
    """

    phase: Phase
    depth: str | None = None
    graph: str | None = None
    set: GraphSet | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The graphs that it calls."""
        return self.set.names if self.set else (self.graph,) if self.graph else ()
