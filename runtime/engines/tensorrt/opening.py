"""The engines of a bundle on one GPU: chosen by their records, then deserialized."""

from __future__ import annotations

import numpy as np

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

Array = np.ndarray


class TensorRtBackend:
    """The engines of a bundle; all are chosen, and their records compared with what is here, at once.

    Raises:
        DynexportError: when the bundle is for another target, there is no GPU, the backend or a plugin is missing, or
            a graph has no engine that can run here and was built here, or is trusted.
    """

    grows = False  # what the GPU holds does not move

    def __init__(self, bundle: Bundle, name: BackendName) -> None:
        check_target(bundle)
        gpu = find_gpu()
        if isinstance(gpu, NoGpu):
            raise DynexportError(
                f"--backend {name}: expected a GPU, found none ({gpu.reason}); --backend onnxruntime runs the same "
                "graphs"
            )
        backend = open_backend(name)
        here = Here({name: backend.version}, gpu, our_plugins().sha256, backend=name)
        self._chosen = {graph.name: engine_for(bundle, graph, here) for graph in bundle.manifest.graphs}
        for stored in self._chosen.values():
            stored.check_trust()
            if stored.record.recipe.stripped:
                bundle.check()  # its weights are the bundle's, and only its record says which those are
        self._bundle, self._trt, self._device = bundle, backend.trt, Device(name)
        if any(stored.record.recipe.plugins_sha256 for stored in self._chosen.values()):
            load_with_kernels(backend.trt)

    def open(self, graph: Graph) -> Engine:
        """Deserialize the engine of a graph."""
        stored = self._chosen[graph.name]
        # A record names the hashes of its weights, and the bundle's were compared with them: they are the same.
        weights = self._bundle.path / graph.file if stored.record.recipe.stripped else None
        return TensorRtEngine(self._trt, stored.read(), graph, self._device, weights)

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return a handle: an array of zeros that is never written, for which the GPU has memory of its own."""
        return np.zeros(shape, dtype)

    def copy_row(self, buffer: Array, row: int, target: int, entries: int) -> None:
        """Copy a row on the GPU, all of its slots: they lie side by side there."""
        with self._device.turn:
            source, to = self._device.mirror(buffer[row]), self._device.mirror(buffer[target])
            self._device.copy(to, source, buffer[row].nbytes)
            self._device.wait()


__all__ = ["TensorRtBackend"]
