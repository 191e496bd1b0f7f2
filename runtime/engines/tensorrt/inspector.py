"""List the layers of an engine with TensorRT's engine inspector; it needs a GPU that can load the engine."""

from __future__ import annotations

import json

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.backend import open_backend
from dynexport.runtime.engines.tensorrt.check import Here, check_record
from dynexport.runtime.engines.tensorrt.network import Log
from dynexport.runtime.engines.tensorrt.plugins import our_plugins
from dynexport.runtime.engines.tensorrt.store import Stored


def engine_layers(stored: Stored, here: Here) -> list[str]:
    """Return the names of an engine's layers, in the order in which they run.

    Raises:
        DynexportError: when the engine cannot run here.
    """
    check_record(stored.record, here)
    backend = open_backend(stored.record.recipe.backend)
    if stored.record.recipe.plugins_sha256:
        our_plugins().load(backend.trt)
    log = Log(backend.trt)
    runtime = backend.trt.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine(stored.read())
    if engine is None:
        raise DynexportError(f"{stored.path}: {backend.name} {backend.version} refuses the engine: {log.refusal()}")
    text = engine.create_engine_inspector().get_engine_information(backend.trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return [layer if isinstance(layer, str) else str(layer.get("Name", "?")) for layer in layers]
