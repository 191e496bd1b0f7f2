"""The manifest of a bundle: what a runtime in any language needs to run its graphs (docs/bundle.md)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dynexport.runtime.bundle.caches import Cache, CachePart, Limits
from dynexport.runtime.bundle.contract import Contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.graphs import (
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
)
from dynexport.runtime.bundle.model import Bytes, Cost, Model, Tokens
from dynexport.runtime.bundle.plain_files import hash_plain
from dynexport.runtime.bundle.routing import LayerRouting, Layers, PathRouting, Routing

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

_PHASES: tuple[Phase, ...] = ("prompt", "decode")
_LAYER_PARTS = ("before_attention", "after_attention")


# The name of the depth at which every token runs in every layer.
FULL = "full"


class Depth(Part):
    """A depth: which layers the tokens of a request run in, unless routers decide token by token.

    Attributes:
        name: as on the command line and in reports: "2", "1.5", "keep". Every bundle has the depth "full", all layers
            in both phases, which is not in the list.
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


class Source(Part):
    """The checkpoint that the bundle was made from.

    Attributes:
        model: what the user named.
        config_sha256: the hash of ``config`` as JSON with sorted keys.
        config: its config.json, or what an importer made of that.
        importer: how it was read, when other routing code has written it.
    """

    model: str
    config_sha256: str
    config: dict[str, Any]
    importer: str | None = None


class File(Part):
    """Size and hash of a file of the bundle.

    Attributes:
        sha256: of its content, in hexadecimal.
        bytes: its size.
    """

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Bytes

    @classmethod
    def of(cls, path: Path, expected: str = "a file", *, advice: str = "") -> File:
        """Hash a regular file, no link; errors as for ``open_plain``."""
        sha256, size = hash_plain(path, expected, follow=False, advice=advice)
        return cls(sha256=sha256, bytes=size)


class Manifest(Part):
    """The file ``manifest.json``. The order of lists means nothing, but where a field says so.

    Attributes:
        schema_version: 2; a runtime refuses others.
        contract: what the checkpoint says of its routing; a runtime needs nothing of it.
        trained: whether the checkpoint itself declares this contract's strategy.
        target: what the graphs are written for; ONNX Runtime runs TensorRT's, too.
        precision: how weights are stored. Hidden states and caches have the types that the graphs' inputs say.
        model: sizes of the model.
        depths: what a request may choose, beside full depth; the default is the first that is ``trained``, else full.
        programs: which graph or graphs run which phase, at which depth.
        graphs: the ONNX files.
        caches: one for every place.
        routing: what routers decide, token by token; None where they decide nothing.
        limits: what one call may have.
        cost: what a decode step reads and computes.
        tokens: special tokens.
        source: the checkpoint that the bundle was made from.
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
                        f"graph {graph.name:.80}: {spec.name:.80}: expected {expected.dtype} "
                        f"{list(expected.shape)!s:.80} as in caches, found {spec.dtype} {list(spec.shape)!s:.80}"
                    )


__all__ = [
    "ENGINES",
    "FULL",
    "GOLDEN",
    "HEAD_DIM_MULTIPLE",
    "MANIFEST",
    "NEXT",
    "PAST",
    "PRESENT",
    "SCHEMA_VERSION",
    "WEIGHTS",
    "Bytes",
    "Cache",
    "CachePart",
    "Cost",
    "Depth",
    "File",
    "Graph",
    "GraphSet",
    "LayerRouting",
    "Limits",
    "Manifest",
    "Model",
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
