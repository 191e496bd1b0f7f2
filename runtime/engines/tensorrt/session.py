"""A graph's engine at work: inputs go to the GPU, caches stay there, results come back.

Without a GPU this was run against stand-ins for CUDA and TensorRT only (docs/engines.md, "What has run where").
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.runtime.engines.engine import NO_CACHES, PAST, PRESENT, Caches
from dynexport.runtime.engines.inputs import sizes_of, wanted_inputs
from dynexport.runtime.engines.tensorrt.device import Device
from dynexport.runtime.engines.tensorrt.network import Log
from dynexport.runtime.engines.tensorrt.shapes import profile_for
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph

Array = np.ndarray


class TensorRtEngine:
    """A deserialized engine with a context for every optimization profile.

    Args:
        trt: the backend's module.
        content: the serialized engine; it was made here, and for this GPU (``check.engine_for``).
        graph: its entry in the manifest.
        device: where it runs; engines that share caches share the device.

    Raises:
        DynexportError: when TensorRT refuses the engine.
    """

    def __init__(self, trt: Any, content: bytes, graph: Graph, device: Device) -> None:
        self._log = Log(trt)
        self._runtime = trt.Runtime(self._log.logger)  # has to outlive what it makes
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise DynexportError(f"graph {graph.name}: TensorRT refuses its engine: {self._log.refusal()}")
        self.graph, self._device = graph, device
        self._contexts: dict[int, Any] = {}
        self._bound: dict[tuple[int, Hashable], _Step] = {}

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """As ``Engine`` says; a cache's memory is the GPU's.

        Raises:
            DynexportError: for sizes that no profile has room for, or when TensorRT fails.
        """
        inputs = wanted_inputs(self.graph, inputs)
        profile = profile_for(self.graph, sizes_of(self.graph.inputs, inputs))
        key = profile, caches.place
        step = self._bound.get(key)
        if step is None or not step.fits(inputs, caches):
            step = self._bound[key] = _Step(self, self._context(profile), self._device, inputs, caches)
        return step.run(inputs, lasting=lasting)

    def end_profiling(self) -> Path:
        """Raise DynexportError: TensorRT's time is told by other tools."""
        raise DynexportError(f"graph {self.graph.name}: an engine's operators are timed with: nsys profile")

    def _context(self, profile: int) -> Any:
        """Made once: it holds the memory of all that is between inputs and outputs."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
                raise DynexportError(f"graph {self.graph.name}: no memory for a context: {self._log.refusal()}")
            self._device.wait()
            self._contexts[profile] = context
        return self._contexts[profile]

    def failure(self) -> DynexportError:
        """What to say when an execution fails."""
        return DynexportError(f"graph {self.graph.name}: TensorRT failed in a step: {self._log.refusal()}")


class _Step:
    """Inputs of one shape and one cache, bound once. From its second run on it is a CUDA graph where that can be."""

    def __init__(
        self, engine: TensorRtEngine, context: Any, device: Device, inputs: dict[str, Array], caches: Caches
    ) -> None:
        self._engine, self._context, self._device, self._caches = engine, context, device, caches
        graph = engine.graph
        self._inputs = {name: np.array(value, order="C") for name, value in inputs.items()}
        self._addresses = {name: device.allocate(self, value.nbytes) for name, value in self._inputs.items()}
        for name, value in self._inputs.items():
            if not context.set_input_shape(name, value.shape):
                raise engine.failure()
        sizes = sizes_of(graph.inputs, inputs)
        self._results = {
            spec.name: np.empty(spec.sized(sizes), spec.array_type)
            for spec in graph.outputs
            if not spec.name.startswith(PRESENT)
        }
        for name, value in self._results.items():
            self._addresses[name] = device.allocate(self, value.nbytes)
        self._bind_caches(graph)
        for name, address in self._addresses.items():
            context.set_tensor_address(name, address)
        self._launch: Callable[[], None] | None = None
        self._may_capture = all(size == 1 for symbol, size in sizes.items() if symbol != "B")

    def _bind_caches(self, graph: Graph) -> None:
        """Input and output of a cache are one memory."""
        buffers = self._caches.views()
        for spec in graph.inputs:
            if spec.name.startswith(PAST):
                part = spec.name.removeprefix(PAST)
                self._context.set_input_shape(spec.name, buffers[part].shape)
                self._addresses[spec.name] = self._addresses[f"{PRESENT}{part}"] = self._device.mirror(buffers[part])

    def fits(self, inputs: dict[str, Array], caches: Caches) -> bool:
        """Whether a step has this cache and inputs of these shapes."""
        return caches.same(self._caches) and all(
            value.shape == self._inputs[name].shape for name, value in inputs.items()
        )

    def run(self, inputs: dict[str, Array], *, lasting: bool) -> dict[str, Array]:
        """Run with these values."""
        for name, value in inputs.items():
            self._inputs[name][...] = value
            self._device.copy_in(self._addresses[name], self._inputs[name])
        if self._launch is not None:
            self._launch()
        else:
            self._execute()
        for name, value in self._results.items():
            self._device.copy_out(value, self._addresses[name])
        self._device.wait()
        if self._launch is None:
            # Not before it ran once: TensorRT then allocates, which no capture survives.
            captured = self._device.capture(self._execute) if self._may_capture else None
            self._launch = captured or self._execute
        return {name: value.copy() for name, value in self._results.items()} if lasting else self._results

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise self._engine.failure()


__all__ = ["TensorRtEngine"]
