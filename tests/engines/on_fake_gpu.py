"""A bundle's engines as the stand-ins of ``fake_gpu`` take them, and a machine that has these instead of a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import FakeCuda, FakeTensorRt, engine_content

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import File, Graph
from dynexport.runtime.engines.tensorrt import backend as backends
from dynexport.runtime.engines.tensorrt import gpu as gpus
from dynexport.runtime.engines.tensorrt import opening
from dynexport.runtime.engines.tensorrt.backend import Backend, BackendName, BuildTarget
from dynexport.runtime.engines.tensorrt.build import recipe_of
from dynexport.runtime.engines.tensorrt.gpu import Gpu
from dynexport.runtime.engines.tensorrt.record import EngineRecord
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes
from dynexport.runtime.engines.tensorrt.store import place_for_engine, put

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
        recipe = recipe_of(bundle, graph, backend, BuildTarget(("8.9",)), plugins, strip=strip)
        with place_for_engine(bundle) as part:
            shapes = [{name: [*map(list, s)] for name, s in shapes.items()} for shapes in profile_shapes(graph)]
            part.write_bytes(engine_content(bundle.path / graph.file, shapes, stripped=strip))
            record = EngineRecord(
                recipe=recipe, engine=File.of(part), profiles=graph.profiles, cuda=None, build_seconds=0, peak_bytes=0
            )
            put(bundle, record, part)


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
