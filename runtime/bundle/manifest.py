"""The manifest of a bundle: all that a runtime in any language needs to run its graphs (docs/bundle.md)."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dynexport.runtime.bundle.caches import Cache, CachePart, CacheText, Limits
from dynexport.runtime.bundle.contract import Contract
from dynexport.runtime.bundle.drafting import Drafting, Ngrams
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.graphs import (
    ARRAY_TYPES,
    PART,
    PAST,
    PRESENT,
    Graph,
    GraphSet,
    Part,
    Phase,
    Profile,
    ProfileName,
    Program,
    TensorSpec,
    by_file,
    check_parts,
)
from dynexport.runtime.bundle.model import Bytes, Cost, Model, PartCost, Tokens, check_layers
from dynexport.runtime.bundle.routing import LayerPart, LayerRouting, Layers, PathRouting, Routing
from dynexport.runtime.bundle.sources import File, Source

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
WEIGHTS = "model.data"
GOLDEN = "golden.safetensors"
# Begins the names of golden vectors that PyTorch computed with the bundle's rounded numbers.
DEQUANTISED = "dequantised."
ENGINES = "engines"
# A complete new bundle, inside the directory that it is about to replace.
NEXT = ".dynexport-next"
# A cache's head size is the model's, rounded up to a multiple of this if the engine requires it.
HEAD_DIM_MULTIPLE = 8

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "gguf"]
TargetName = Literal["onnxruntime", "tensorrt"]

_PHASES: tuple[Phase, ...] = ("prompt", "decode")
_LAYER_PARTS = ("before_attention", "after_attention")


# The name of the depth at which every token runs in every layer.
FULL = "full"


class Depth(Part):
    """A depth: the layers that a request runs.

    Attributes:
        name: name on the command line and in reports, such as "2", "1.5" or "keep". Every bundle also has the depth
            "full", all layers in both phases, which is not listed.
        ratio: target speedup that the kept layers were chosen for; None for layers given by hand.
        keep: layers that generated tokens run in, ascending.
        prompt: layers that prompt tokens run in, ascending.
        trained: whether the checkpoint declares these layers, that is, was trained to run in them alone.
    """

    name: str
    ratio: float | None
    keep: Layers
    prompt: Layers
    trained: bool = False


class Manifest(Part):
    """The content of ``manifest.json``. The order of a list has no meaning unless its field says so.

    Attributes:
        schema_version: always 2; a runtime refuses other versions.
        contract: the checkpoint's routing contract, for information; a runtime does not need it.
        trained: whether the checkpoint declares this contract's strategy.
        target: engine that the graphs are written for; ONNX Runtime also runs graphs for TensorRT.
        precision: storage format of the weights; "gguf": a GGUF file's own blocks. The graphs' inputs give the types of
            hidden_states and caches.
        model: sizes of the model.
        depths: depths that a request may choose, beside full depth. The default is the first ``trained`` one, else
            full depth.
        programs: the graph, or set of graphs, for each phase and depth.
        graphs: the ONNX files.
        caches: one KV cache for every place.
        cache_text: for int8 caches, the text that their scales were measured on; else None.
        routing: decisions that routers make for each token; None if there are no routers.
        drafting: how tokens are drafted where a user does not say; None before it was measured.
        limits: limits of one call.
        cost: bytes and FLOPs of a decode step.
        operators: names of dynexport's custom operators in the graphs, ascending. Each has a body in standard
            operators, so that a runtime without their library runs the graphs too.
        tokens: special tokens.
        source: the checkpoint that the bundle was made from.
        tools: versions of the packages that made the bundle.
        files: size and hash of every other file of the bundle, by name; names have no directories.
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
    cache_text: CacheText | None = None
    routing: Routing | None = None
    drafting: Drafting | None = None
    limits: Limits
    cost: Cost
    operators: tuple[str, ...] = ()
    tokens: Tokens
    source: Source
    tools: dict[str, str]
    files: dict[str, File]

    @cached_property
    def full(self) -> Depth:
        """Full depth: every token runs in every layer, except where routers decide."""
        everything = tuple(range(self.model.layers))
        return Depth(name=FULL, ratio=1.0, keep=everything, prompt=everything, trained=True)

    @property
    def ngrams(self) -> Ngrams | None:
        """The table of short token sequences that drafts, if there is one."""
        return None if self.drafting is None else self.drafting.ngrams

    def graph(self, name: str) -> Graph:
        """Return the graph of this name. Raises DynexportError if there is none."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise DynexportError(f"graphs: expected one of the name {name:.80}, found none; convert again")

    @property
    def files_with_graphs(self) -> tuple[Graph, ...]:
        """The ONNX files, each as one graph: the parts of a file together, under the file's name."""
        return by_file(self.graphs)

    def program(self, phase: Phase, depth: Depth) -> Program:
        """Return the program for a phase and depth: one for that depth, else one for every depth.

        Raises:
            DynexportError: when there is none.
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
        if self.ngrams is not None and self.ngrams.file not in self.files:
            raise ValueError(f"drafting.ngrams: expected its file {self.ngrams.file:.80} among files, found none")
        return self

    def _check_layers(self) -> None:
        layers = self.model.layers
        check_layers(self.model, self.cost, paths=isinstance(self.routing, PathRouting))
        decided = self.routing.decisions if isinstance(self.routing, LayerRouting) else 0
        if len(self.cost.parts) not in (0, decided):
            raise ValueError(f"cost.parts: expected one for each of {decided} decisions, found {len(self.cost.parts)}")
        routed: Layers = ()
        if isinstance(self.routing, LayerRouting):
            decisions, span = len(self.routing.layers), self.routing.span
            if decisions * span > layers:
                raise ValueError(f"routing.span: expected {layers} layers in all, found {decisions} times {span}")
            routed = self.routing.covered
        listed = {
            "routing.layers": routed,
            "keep of drafting": (self.drafting and self.drafting.keep) or (),
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
        check_parts(self.graphs)
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
        if found.layers:
            expected["layers"] = self.model.layers
        for name, count in expected.items():
            if len(getattr(found, name)) != count:
                raise ValueError(f"programs: set: {name}: expected {count} names, found {len(getattr(found, name))}")

    def _check_caches(self) -> None:
        size = self.model.head_dim
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
            heads = self.model.kv_heads_in(cache.place)
            if not heads and cache.parts:
                raise ValueError(f"cache {cache.place}: expected no parts in a layer without attention, found some")
            for name in ("key", "value") if heads else ():
                shape = cache.parts[name].shape if name in cache.parts else ()
                if not (len(shape) == 4 and shape[1] == heads and shape[3] in (size, padded)):
                    found = f"{list(shape)!s:.80}"
                    raise ValueError(
                        f"cache {cache.place}: {name}: expected {heads} heads of {size} as in model, found {found}"
                    )
                if (cache.parts[name].dtype == "int8") != (cache.parts[name].scale is not None):
                    raise ValueError(f"cache {cache.place}: {name}: expected a scale for int8 and only there")
            self._check_slots(cache)
        for graph in self.graphs:
            if not set(graph.places or ()) <= set(places):
                raise ValueError(f"places of graph {graph.name:.80}: expected places of caches, found others")
            self._check_cache_inputs(graph)

    def _check_slots(self, cache: Cache) -> None:
        """Raise ValueError when the parts of a cache have not the same rows and slots."""
        slots = cache.parts["key"].shape[2] if cache.parts else 0
        for name, part in cache.parts.items():
            found = part.shape[::2] if len(part.shape) == 4 else part.shape
            if slots == "B" or found != ("B", slots):
                raise ValueError(
                    f"cache {cache.place}: {name}: expected rows B and the slots of its keys, "
                    f"found {list(part.shape)!s:.80}"
                )

    def _check_cache_inputs(self, graph: Graph) -> None:
        """Raise ValueError when a graph's cache inputs disagree with ``caches``."""
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
                        f"graph {graph.name:.80}: {spec.name:.80}: expected {expected.dtype} "
                        f"{list(expected.shape)!s:.80} as in caches, found {spec.dtype} {list(spec.shape)!s:.80}"
                    )


__all__ = [
    "ARRAY_TYPES",
    "DEQUANTISED",
    "ENGINES",
    "FULL",
    "GOLDEN",
    "HEAD_DIM_MULTIPLE",
    "MANIFEST",
    "NEXT",
    "PART",
    "PAST",
    "PRESENT",
    "SCHEMA_VERSION",
    "WEIGHTS",
    "Bytes",
    "Cache",
    "CachePart",
    "CacheText",
    "Cost",
    "Depth",
    "File",
    "Graph",
    "GraphSet",
    "LayerPart",
    "LayerRouting",
    "Limits",
    "Manifest",
    "Model",
    "PartCost",
    "PathRouting",
    "Phase",
    "Precision",
    "Profile",
    "ProfileName",
    "Program",
    "Source",
    "TargetName",
    "TensorSpec",
    "Tokens",
]
