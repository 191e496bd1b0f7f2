"""The manifest of a bundle: what a runtime in any language needs to run its graphs (docs/bundle.md)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynexport.runtime.bundle.contract import Contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import hash_plain

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
WEIGHTS = "model.data"
GOLDEN = "golden.safetensors"
ENGINES = "engines"
# A complete bundle in the directory whose place it is about to take.
NEXT = ".dynexport-next"
# Heads of caches have as many channels as the model's, or the next multiple of this where the engine wants one.
HEAD_DIM_MULTIPLE = 8

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
TargetName = Literal["onnxruntime", "tensorrt"]
ProfileName = Literal["prefill", "decode"]
Phase = Literal["prompt", "decode"]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Bytes = Annotated[int, Field(ge=0)]
_ARRAY_TYPES: dict[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
ArrayType = Annotated[str, Field(pattern=f"^({'|'.join(_ARRAY_TYPES)})$")]
Layers = Annotated[tuple[int, ...], Field(min_length=1)]


_PHASES: tuple[Phase, ...] = ("prompt", "decode")
_LAYER_PARTS = ("before_attention", "after_attention")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# The name of the depth at which every token runs in every layer.
FULL = "full"


class Depth(_Part):
    """A depth: which layers the tokens of a request run in, unless routers decide token by token.

    Attributes:
        name: as on the command line and in reports: "2", "1.5", "keep", "full".
        ratio: the target speedup that the kept layers follow from, or None for layers given by hand.
        keep: layers that a generated token runs in, ascending.
        prompt: layers that a prompt's tokens run in, ascending.
        trained: whether the checkpoint itself declares these layers: only then was it trained to run in them alone.
    """

    name: str
    ratio: float | None
    keep: Layers
    prompt: Layers
    trained: bool = False


class TensorSpec(_Part):
    """An input or output of a graph.

    Attributes:
        shape: numbers, or symbols: B rows, S new tokens a row, K logits a row, N tokens in a line, C tokens of one row
            in a line's attention, M slots of a cache, M_routed slots of the cache of a layer that chooses its tokens.
    """

    name: str
    dtype: ArrayType
    shape: tuple[int | str, ...]

    @property
    def array_type(self) -> type[np.generic]:
        """What its arrays hold; bfloat16, which numpy lacks, as the same 16 bits."""
        return _ARRAY_TYPES[self.dtype]

    def sized(self, sizes: Mapping[str, int]) -> list[int]:
        """Its shape with symbols replaced. Raises DynexportError for a symbol that has no size."""
        unknown = [dim for dim in self.shape if isinstance(dim, str) and dim not in sizes]
        if unknown:
            raise DynexportError(f"{self.name:.80}: expected a dimension of {', '.join(sizes)}, found {unknown[0]:.40}")
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]


class Profile(_Part):
    """An optimization profile: the sizes that an engine is built for.

    Attributes:
        ranges: symbol of a dimension -> least, usual and greatest size.
    """

    name: ProfileName
    ranges: dict[str, tuple[Size, Size, Size]]


# What the inputs and outputs that hold a cache begin with; the rest of the name says which cache it is.
PAST, PRESENT = "past_key_values.", "present."


class Graph(_Part):
    """One ONNX file.

    Attributes:
        layers: the model's layers that it holds, ascending: the rows of its input ``layer_active``.
        places: the caches that it reads and writes, ascending: the rows of its input ``cache_lengths``. None: the one
            cache that a call is for, whose inputs have no number in their names.
        share_memory: whether a session should plan which results share memory. Of a graph of thousands of nodes the
            plan takes time that grows with the square of their number, and saves nothing.
        profiles: of a TensorRT bundle, the sizes that engines are built for; none where any size is taken.
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


class GraphSet(_Part):
    """Graphs that are called in turn, once a hop, where each token takes a path through a pool of layers.

    Attributes:
        embedding: the graph that gives hidden states, and rotary angles.
        routers: the graph that chooses each hop's layer; one name for every hop.
        before_attention, after_attention: the two parts of every layer, by its index.
        attention: the graph between them, called for the cache of one place.
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


class Program(_Part):
    """What runs new tokens: one graph, or a set of them.

    Attributes:
        phase: "prompt" for tokens that were given, "decode" for generated ones. A program whose graph takes several
            tokens of a row may run either, in calls of one phase.
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


class CachePart(_Part):
    """One buffer of a cache.

    Attributes:
        input, output: its names in graphs that hold this place; both are bound to the same memory.
        shape: B rows, then numbers; M slots, where the graph has no number there.
    """

    input: str
    output: str
    dtype: ArrayType
    shape: tuple[int | Literal["B", "M"], ...]

    @property
    def array_type(self) -> type[np.generic]:
        """What its arrays hold; bfloat16, which numpy lacks, as the same 16 bits."""
        return _ARRAY_TYPES[self.dtype]


class Cache(_Part):
    """The KV cache of one place: of a layer, or of a hop.

    A buffer has ``min(tokens, most) * per_token + slack`` slots for rows of ``tokens`` tokens, unless its shape has a
    number there. Entries stand in the slots 0..length-1; what is behind them is never read.

    Attributes:
        parts: "key" and "value" [B, kv_heads, M, head_dim]; "position" int64 [B, M], the original position of every
            entry; "step" int64 [B, M], the hop that made it.
        most: entries that a row may have, where that is fewer than its tokens; a further token finds the cache full.
        per_token: entries that a token may make.
        slack: slots behind the entries that a call may write, and nobody reads.
    """

    place: Annotated[int, Field(ge=0)]
    parts: dict[str, CachePart]
    most: Size | None = None
    per_token: Size = 1
    slack: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class LayerRouting(_Part):
    """Routers decide, in some layers, which tokens run there.

    Graphs take ``token_counts`` int64 [B] and ``forced_routes`` int64 [R, B, S] (1 runs, 0 skips, -1 leaves it to the
    router), and give ``routes`` bool, ``route_scores`` and ``route_margins`` float32 [R, B, S] and ``overflow`` int64
    [R, B], tokens that found the layer's cache full.

    Attributes:
        layers: those layers, ascending: the rows R.
        overflow: what a full cache means: "residual", the token passes the layer by; "error", generation stops.
    """

    kind: Literal["layers"] = "layers"
    layers: Layers
    overflow: Literal["residual", "error"]


class PathRouting(_Part):
    """A router sends every token, hop by hop, to a layer of the pool, or out.

    A whole-step graph takes ``token_counts`` int64 [B] and ``forced_paths`` int64 [hops, B, S] (a layer, the number of
    layers to leave, -1 leaves it to the router), and gives ``paths`` int64, ``path_scores`` and ``path_margins``
    float32 [hops, B, S], and ``overflow`` int64 [1, B] where layers have room for a share of the tokens.

    Attributes:
        hops: hops after which every token leaves.
        min_hops: leaving is not allowed in the hops before this one.
        exit: whether leaving is a choice, the last score.
        reuse: whether a token may visit a layer again.
        places: what a cache belongs to: "hops", its hop, whichever layer made the entry; "layers", its layer.
        layer_capacity: a layer has room for ``max(1, ceil(layer_capacity * B * S))`` tokens of a call.
    """

    kind: Literal["paths"] = "paths"
    hops: Size
    min_hops: Annotated[int, Field(ge=0)]
    exit: bool
    reuse: bool
    places: Literal["hops", "layers"]
    layer_capacity: Annotated[float, Field(gt=0, le=1)] = 1.0


Routing = Annotated[LayerRouting | PathRouting, Field(discriminator="kind")]


class Limits(_Part):
    """What one call of a program may have.

    Attributes:
        rows: most rows; None: any number.
        prompt: most new tokens of a row.
        filled: most new tokens of a row where a cache of the call holds entries.
        tokens: most new tokens of all rows together.
        logits: most logits of a row.
        together: whether rows may share a call in which one has more than one token: "always"; "empty", where the
            caches of all rows are empty; "never".
        whole_prompts: tokens of a prompt compete for layers, later ones too: a prompt is one call, never cut.
        compete: tokens of a call compete for room in layers: what a row gives depends on the others in its call.
    """

    rows: Size | None = None
    prompt: Size | None = None
    filled: Size | None = None
    tokens: Size | None = None
    logits: Size | None = None
    together: Literal["always", "empty", "never"] = "empty"
    whole_prompts: bool = False
    compete: bool = False


class Model(_Part):
    """The sizes that a runtime needs."""

    family: str
    layers: Size
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_length: Size
    parameters: Size


class Cost(_Part):
    """Bytes that a decode step must read (weights as stored in the bundle, caches), and FLOPs.

    Attributes:
        shared: head and final norm, whatever is skipped.
        layers: weights of each layer, its router included.
        kv_per_token: key and value of one cached token in one layer.
        layer_flops: of one layer's products for one token, two per weight.
        router: weights that one choice of a path's next layer reads; 0 where tokens take no paths.
        router_flops: of one such choice.
    """

    shared: Annotated[int, Field(ge=1)]
    layers: tuple[Bytes, ...]
    kv_per_token: Bytes
    layer_flops: Annotated[int, Field(ge=1)]
    router: Bytes = 0
    router_flops: Bytes = 0


class Tokens(_Part):
    """Special tokens.

    Attributes:
        bos, pad: None where the model has none.
        eos: end any text; empty when the model has none.
        turn_end: end an answer in a chat beside ``eos``: by the tokenizer or the chat template, not the config.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    turn_end: tuple[int, ...] = ()
    pad: int | None = None


class Source(_Part):
    """The checkpoint that the bundle was made from.

    Attributes:
        model: what the user named.
        config_sha256: the hash of ``config``.
        config: its config.json, or what an importer made of that.
        importer: how it was read, when other routing code has written it.
    """

    model: str
    config_sha256: str
    config: dict[str, Any]
    importer: str | None = None


class File(_Part):
    """Size and hash of a file of the bundle."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Bytes

    @classmethod
    def of(cls, path: Path, expected: str = "a file", *, advice: str = "") -> File:
        """Hash a regular file, no link; errors as for ``open_plain``."""
        sha256, size = hash_plain(path, expected, follow=False, advice=advice)
        return cls(sha256=sha256, bytes=size)


class Manifest(_Part):
    """``manifest.json``. The order of lists means nothing, but where a field says so.

    Attributes:
        contract: what the checkpoint says of its routing; a runtime needs nothing of it.
        trained: whether the checkpoint itself declares this contract's strategy.
        target: what the graphs are written for; ONNX Runtime runs TensorRT's, too.
        depths: what a request may choose, beside full depth.
        programs: which graph or graphs run which phase, at which depth.
        caches: one for every place.
        routing: what routers decide, token by token; None where they decide nothing.
        tools: versions of the packages that made the bundle.
        files: every other file of the bundle; names have no directories.
    """

    schema_version: int
    contract: Contract
    trained: bool
    target: TargetName = "onnxruntime"
    precision: Precision
    model: Model
    depths: tuple[Depth, ...]
    programs: Annotated[tuple[Program, ...], Field(min_length=1)]
    graphs: Annotated[tuple[Graph, ...], Field(min_length=1)]
    caches: Annotated[tuple[Cache, ...], Field(min_length=1)]
    routing: Routing | None = None
    limits: Limits
    cost: Cost
    tokens: Tokens
    source: Source
    tools: dict[str, str]
    files: dict[str, File]

    @cached_property
    def full(self) -> Depth:
        """The depth at which every token runs in every layer, or where routers say."""
        everything = tuple(range(self.model.layers))
        return Depth(name=FULL, ratio=1.0, keep=everything, prompt=everything, trained=True)

    def graph(self, name: str) -> Graph:
        """Return a graph by its name. Raises DynexportError where there is none."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise DynexportError(f"graphs: expected one of the name {name:.80}, found none; convert again")

    def program(self, phase: Phase, depth: Depth) -> Program:
        """Return what runs a phase at a depth: a program for that depth, else one for every depth.

        Raises:
            DynexportError: where there is none.
        """
        found = [p for p in self.programs if p.phase == phase and p.depth in (depth.name, None)]
        if not found:
            raise DynexportError(f"no graph for the phase {phase} at the depth {depth.name:.80}; convert again with it")
        return min(found, key=lambda program: program.depth is None)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        self._check_layers()
        self._check_names()
        self._check_caches()
        return self

    def _check_layers(self) -> None:
        layers = self.model.layers
        if len(self.cost.layers) != layers:
            raise ValueError(f"cost.layers: expected {layers} as in model.layers, found {len(self.cost.layers)}")
        listed = {
            "routing.layers": self.routing.layers if isinstance(self.routing, LayerRouting) else (),
            **{f"layers of graph {graph.name:.80}": graph.layers for graph in self.graphs},
            **{f"keep of depth {depth.name:.80}": depth.keep for depth in self.depths},
            **{f"prompt of depth {depth.name:.80}": depth.prompt for depth in self.depths},
        }
        for name, indices in listed.items():
            if indices != tuple(sorted(set(indices))) or not set(indices) <= set(range(layers)):
                raise ValueError(f"{name}: expected ascending layers 0..{layers - 1}, found others")

    def _check_names(self) -> None:
        for what, names in (("depths", [d.name for d in self.depths]), ("graphs", [g.name for g in self.graphs])):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: expected a name for each, found one twice")
        if FULL in (depth.name for depth in self.depths):
            raise ValueError(f"depths: expected other names than {FULL}, which every bundle has, found it")
        graphs, depths = {graph.name for graph in self.graphs}, {FULL, None, *(depth.name for depth in self.depths)}
        for program in self.programs:
            if (program.graph is None) == (program.set is None):
                raise ValueError("programs: expected either a graph or a set in each, found both or none")
            if program.depth not in depths:
                raise ValueError(f"programs: expected a depth of the manifest, found {program.depth!r:.80}")
            if unknown := sorted(set(program.names) - graphs):
                raise ValueError(f"programs: expected a graph of the manifest, found {unknown[0]!r:.80}")
            self._check_set(program.set)
        for phase in _PHASES:
            for depth in (self.full, *self.depths):
                try:
                    self.program(phase, depth)
                except DynexportError as error:
                    raise ValueError(f"programs: {error}") from error

    def _check_set(self, found: GraphSet | None) -> None:
        if found is None:
            return
        if not isinstance(self.routing, PathRouting):
            raise ValueError("programs: expected a set where routing has paths, found one without")
        expected = {"routers": self.routing.hops} | dict.fromkeys(_LAYER_PARTS, self.model.layers)
        for name, count in expected.items():
            if len(getattr(found, name)) != count:
                raise ValueError(f"programs: set: {name}: expected {count} names, found {len(getattr(found, name))}")

    def _check_caches(self) -> None:
        heads, size = self.model.kv_heads, self.model.head_dim
        padded = -(-size // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
        places = [cache.place for cache in self.caches]
        if sorted(places) != list(range(len(places))):
            raise ValueError(f"caches: expected the places 0..{len(places) - 1}, found others")
        count, of_what = self.model.layers, "layers"
        if isinstance(self.routing, PathRouting) and self.routing.places == "hops":
            count, of_what = self.routing.hops, "hops"
        if len(places) != count:
            raise ValueError(f"caches: expected one for each of {count} {of_what}, found {len(places)}")
        for cache in self.caches:
            for name in ("key", "value"):
                shape = cache.parts[name].shape if name in cache.parts else ()
                if not (len(shape) == 4 and shape[1] == heads and shape[3] in (size, padded)):
                    found = f"{list(shape)!s:.80}"
                    raise ValueError(
                        f"cache {cache.place}: {name}: expected {heads} heads of {size} as in model, found {found}"
                    )
        for graph in self.graphs:
            if not set(graph.places or ()) <= set(places):
                raise ValueError(f"places of graph {graph.name:.80}: expected places of caches, found others")
            self._check_cache_inputs(graph)

    def _check_cache_inputs(self, graph: Graph) -> None:
        """Raise ValueError where a graph says something else of its caches than ``caches`` does."""
        by_place = {str(cache.place): [cache] for cache in self.caches}
        for name, spec in graph.caches.items():
            place, _, part = name.rpartition(".")
            found = by_place.get(place, []) if place else self.caches
            if not found or any(part not in cache.parts for cache in found):
                raise ValueError(
                    f"graph {graph.name:.80}: {spec.name:.80}: expected a cache's part, found no such cache"
                )
            shape = tuple("M" if dim == "M_routed" else dim for dim in spec.shape)
            for expected in (cache.parts[part] for cache in found):
                if (expected.dtype, expected.shape) != (spec.dtype, shape):
                    raise ValueError(
                        f"graph {graph.name:.80}: {spec.name:.80}: expected {expected.dtype} {list(expected.shape)!s:.80} "
                        f"as in caches, found {spec.dtype} {list(spec.shape)!s:.80}"
                    )
