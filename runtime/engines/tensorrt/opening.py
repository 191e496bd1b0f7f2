"""Choose the engines of a bundle by their records and deserialize them on the GPU."""

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
    """The engines of a bundle on one GPU; all are chosen, and their records checked, at the start.

    Raises:
        DynexportError: when the bundle is for another target; there is no GPU; the backend or a plugin is missing; or a
            graph has no engine that can run here and was built here or is trusted.
    """

    grows = False  # device memory of caches is never moved

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
                bundle.check()  # its weights come from the bundle, so their hashes must match
        self._bundle, self._trt, self._device = bundle, backend.trt, Device(name)
        if any(stored.record.recipe.plugins_sha256 for stored in self._chosen.values()):
            load_with_kernels(backend.trt)

    def open(self, graph: Graph) -> Engine:
        """Deserialize the engine of a graph."""
        stored = self._chosen[graph.name]
        # The bundle's weights are those that the engine was built from: their hashes were compared above.
        weights = self._bundle.path / graph.file if stored.record.recipe.stripped else None
        return TensorRtEngine(self._trt, stored.read(), graph, self._device, weights)

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return a handle: a host array of zeros that is never written and stands for device memory."""
        return np.zeros(shape, dtype)

    def copy_row(self, buffer: Array, row: int, target: int, entries: int) -> None:
        """Copy a row on the GPU; all of its slots are copied, because they are contiguous."""
        with self._device.turn:
            source, to = self._device.mirror(buffer[row]), self._device.mirror(buffer[target])
            self._device.copy(to, source, buffer[row].nbytes)
            self._device.wait()


__all__ = ["TensorRtBackend"]
