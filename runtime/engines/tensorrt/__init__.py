"""TensorRT and TensorRT-RTX: build and run engines of a bundle's graphs, stored in the bundle with records."""

from dynexport.runtime.engines.tensorrt.backend import (
    BACKENDS,
    Backend,
    BackendName,
    BuildTarget,
    choose_target,
    open_backend,
)
from dynexport.runtime.engines.tensorrt.build import Built, build_engine, recipe_of
from dynexport.runtime.engines.tensorrt.builder import Builder
from dynexport.runtime.engines.tensorrt.check import Here, check_record, difference, engine_for, mismatch
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu, find_gpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.engines.tensorrt.record import EngineRecord, Recipe
from dynexport.runtime.engines.tensorrt.shapes import profile_for, profile_shapes
from dynexport.runtime.engines.tensorrt.store import Stored, stored_engines

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "BuildTarget",
    "Builder",
    "Built",
    "EngineRecord",
    "Gpu",
    "Here",
    "NoGpu",
    "PluginLibrary",
    "Recipe",
    "Stored",
    "build_engine",
    "check_record",
    "choose_target",
    "difference",
    "engine_for",
    "find_gpu",
    "mismatch",
    "open_backend",
    "profile_for",
    "profile_shapes",
    "recipe_of",
    "stored_engines",
]
