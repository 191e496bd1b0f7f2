"""Engines of a bundle for one decoder: chosen by their records, then deserialized on one device."""

from __future__ import annotations

from collections.abc import Callable

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.engine import Engine
from dynexport.runtime.engines.tensorrt.backend import BackendName, open_backend
from dynexport.runtime.engines.tensorrt.check import Here, check_target, engine_for
from dynexport.runtime.engines.tensorrt.device import Device
from dynexport.runtime.engines.tensorrt.gpu import NoGpu, find_gpu
from dynexport.runtime.engines.tensorrt.kernels import load_with_kernels
from dynexport.runtime.engines.tensorrt.plugins import our_plugins
from dynexport.runtime.engines.tensorrt.session import TensorRtEngine


def tensorrt_opener(bundle: Bundle, name: BackendName) -> Callable[[Graph], Engine]:
    """What opens the engine of a graph; all are chosen, and their records compared with what is here, at once.

    Raises:
        DynexportError: when the bundle is for another target, there is no GPU, the backend or a plugin is missing, or
            a graph has no engine that can run here and was built here, or is trusted.
    """
    check_target(bundle)
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise DynexportError(
            f"--backend {name}: expected a GPU, found none ({gpu.reason}); --backend onnxruntime runs the same graphs"
        )
    backend = open_backend(name)
    here = Here({name: backend.version}, gpu, our_plugins().sha256, backend=name)
    chosen = {graph.name: engine_for(bundle, graph, here) for graph in bundle.manifest.graphs}
    for stored in chosen.values():
        stored.check_trust()
        if stored.record.recipe.stripped:
            bundle.check()  # its weights are the bundle's, and only its record says which those are
    device = Device(name)
    if any(stored.record.recipe.plugins_sha256 for stored in chosen.values()):
        load_with_kernels(backend.trt)

    def opened(graph: Graph) -> Engine:
        stored = chosen[graph.name]
        # A record names the hashes of its weights, and the bundle's were compared with them: they are the same.
        weights = bundle.path / graph.file if stored.record.recipe.stripped else None
        return TensorRtEngine(backend.trt, stored.read(), graph, device, weights)

    return opened


__all__ = ["tensorrt_opener"]
