"""A bundle's engines as the stand-ins of ``fake_gpu`` take them, and a machine that has these instead of a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE
from fake_gpu import FakeCuda, FakeTensorRt, engine_content

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import File, Graph
from dynexport.runtime.engines.tensorrt import backend as backends
from dynexport.runtime.engines.tensorrt import gpu as gpus
from dynexport.runtime.engines.tensorrt import opening
from dynexport.runtime.engines.tensorrt.backend import Backend, BackendName, BuildTarget
from dynexport.runtime.engines.tensorrt.build import recipe_of
from dynexport.runtime.engines.tensorrt.gpu import Gpu
from dynexport.runtime.engines.tensorrt.record import EngineRecord, Recipe
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes
from dynexport.runtime.engines.tensorrt.store import place_for_engine, put

# 47 slots: rows of a batch do not begin at multiples of 256.
CONTEXT, ROWS = 47, 4
# Checkpoints -> options of their conversion.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"precision": "fp16"},
    "skip-2x": {},
    "mod-router": {},
    "mod-topk": {"max_prompt": 20},
    "radial-step": {"max_prompt": 20},  # more than the head takes at once
    "radial-layer": {},
    "radial-noreuse-min": {"plugins": True},  # prompts by the set, steps by one graph
}
ADA, VERSION = Gpu("Ada card", "8.9", "13.0"), "1.7.1.116"


@dataclass
class Machine:
    """Stand-ins in the place of CUDA, TensorRT-RTX and a GPU."""

    cuda: FakeCuda
    trt: FakeTensorRt

    def built(self, path: Path, *, version: str = VERSION, plugins: Any = None, strip: bool = False) -> Bundle:
        """A bundle, with an engine of each of its graphs."""
        bundle = Bundle.open(path)
        for graph in bundle.manifest.graphs:
            self.build(bundle, graph, version=version, plugins=plugins, strip=strip)
        return bundle

    def build(
        self, bundle: Bundle, graph: Graph, *, version: str = VERSION, plugins: Any = None, strip: bool = False
    ) -> None:
        """An engine of a graph, for the stand-in."""
        backend = Backend("tensorrt-rtx", self.trt, version, ("8.9",))
        store_engine(bundle, graph, recipe_of(bundle, graph, backend, BuildTarget(("8.9",)), plugins, strip=strip))


def store_engine(bundle: Bundle, graph: Graph, recipe: Recipe) -> None:
    """Put what the stand-ins take for an engine of a graph into a bundle, with its record."""
    with place_for_engine(bundle) as part:
        shapes = [{name: [*map(list, s)] for name, s in shapes.items()} for shapes in profile_shapes(graph)]
        part.write_bytes(engine_content(bundle.path / graph.file, shapes, stripped=recipe.stripped))
        record = EngineRecord(
            recipe=recipe, engine=File.of(part), profiles=graph.profiles, cuda=None, build_seconds=0, peak_bytes=0
        )
        put(bundle, record, part)


def convert_case(case: str, bundle: Path) -> None:
    """Convert a case for TensorRT; prompts go in pieces of nine tokens unless they are ranked."""
    options = {"max_batch": ROWS, "max_prompt": 9, "max_length": CONTEXT} | CASES[case]
    convert(CONFORMANCE / case, bundle, target="tensorrt", golden=False, **options)


def install(patch: pytest.MonkeyPatch) -> Machine:
    """Put the stand-ins where the real ones would be."""
    cuda = FakeCuda()
    machine = Machine(cuda, FakeTensorRt(cuda))

    def open_backend(name: BackendName) -> Backend:
        return Backend(name, machine.trt, VERSION, ("8.9",))

    patch.setitem(sys.modules, "cuda.bindings.runtime", cuda)  # type: ignore[arg-type]
    for module in (opening, gpus):
        patch.setattr(module, "find_gpu", lambda: ADA)
    for place in (opening, backends):
        patch.setattr(place, "open_backend", open_backend)
    return machine
