"""Run a graph's engine: inputs are copied to the GPU, caches stay there, results are copied back.

The tests run it against fakes of CUDA and TensorRT; docs/engines.md, "What has run where", says what ran on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import PAST, PRESENT, Graph
from dynexport.runtime.engines.engine import NO_CACHES, Caches
from dynexport.runtime.engines.inputs import sizes_of
from dynexport.runtime.engines.tensorrt.device import Device
from dynexport.runtime.engines.tensorrt.network import Log, parser_refusal
from dynexport.runtime.engines.tensorrt.shapes import profile_for

Array = np.ndarray
_Key: TypeAlias = tuple[int, Hashable]
# TensorRT requires addresses to be multiples of this.
_ALIGNMENT = 256


class TensorRtEngine:
    """A deserialized engine.

    It has an execution context for every pair of optimization profile and place, because a CUDA graph is valid only
    while the context that it was captured from is unchanged. All contexts share the memory of intermediate results.

    Args:
        trt: the backend's module.
        content: the serialized engine, already checked to be trusted and for this GPU (``check.engine_for``).
        weights: ONNX file with the weights of a stripped engine; None if the engine has weights.
        graph: the graph's entry in the manifest.
        device: device that it runs on; engines that share caches share the device.

    Raises:
        DynexportError: when TensorRT refuses the engine or its weights, or the GPU lacks memory for it.
    """

    def __init__(self, trt: Any, content: bytes, graph: Graph, device: Device, weights: Path | None = None) -> None:
        self._log = Log(trt)
        self._runtime = trt.Runtime(self._log.logger)  # has to outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise DynexportError(f"graph {graph.name}: TensorRT refuses its engine: {self._log.refusal()}")
        if weights is not None:
            _refit(trt, self._engine, graph, weights, self._log)
        self.graph, self._trt, self._device = graph, trt, device
        self._between_size = int(self._engine.device_memory_size_v2)
        self._between = device.allocate(self, self._between_size)
        self._names = [spec.name for spec in graph.inputs if not spec.name.startswith(PAST)]
        self._contexts: dict[_Key, Any] = {}
        self._bound: dict[_Key, _Step] = {}

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """Run the graph once; see ``Engine.run``. Caches are in device memory.

        Raises:
            DynexportError: when no profile accepts the sizes, or TensorRT fails.
        """
        inputs = {name: inputs[name] for name in self._names}
        key = profile_for(self.graph, sizes_of(self.graph.inputs, inputs)), caches.place
        with self._device.turn:
            self._log.errors.clear()
            if key not in self._bound or not self._bound[key].fits(inputs, caches):
                # Removed first, to free its memory, and because its context is about to be bound to other memory.
                self._bound.pop(key, None)
                self._bound[key] = _Step(self.graph, self._context(key), self._device, self._log, inputs, caches)
            return self._bound[key].run(inputs, lasting=lasting)

    def prepare(self, inputs: Mapping[str, Array], caches: Caches, *, shared: bool = False) -> None:
        """Return None: ``run`` binds once itself, and replays a CUDA graph."""

    def end_profiling(self) -> Path:
        """Raise DynexportError: engines are profiled with other tools."""
        raise DynexportError(f"graph {self.graph.name}: an engine's operators are timed with: nsys profile")

    def _context(self, key: _Key) -> Any:
        if key not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            if context is None or not context.set_optimization_profile_async(key[0], self._device.stream):
                raise _failure(self.graph, self._log)
            context.set_device_memory(self._between, self._between_size)
            self._device.wait()
            self._contexts[key] = context
        return self._contexts[key]


class _Step:
    """Inputs of one set of shapes, bound with their caches; runs after the first use a CUDA graph if possible."""

    def __init__(
        self, graph: Graph, context: Any, device: Device, log: Log, inputs: dict[str, Array], caches: Caches
    ) -> None:
        self._graph, self._context, self._device, self._log, self._caches = graph, context, device, log, caches
        types = {spec.name: spec.array_type for spec in graph.inputs}
        self._inputs = {name: np.array(value, types[name], order="C") for name, value in inputs.items()}
        sizes = sizes_of(graph.inputs, inputs)
        self._results = {spec.name: np.empty(spec.sized(sizes), spec.array_type) for spec in graph.results}
        arrays = self._inputs | self._results
        self._addresses = {name: device.allocate(self, value.nbytes) for name, value in arrays.items()}
        self._detours: list[tuple[int, int, int]] = []
        for name, value in self._inputs.items():
            self._check(context.set_input_shape(name, value.shape))
        for name, address in self._addresses.items():
            self._check(context.set_tensor_address(name, address))
        self._bind_caches()
        # Only decode steps repeat their shapes, so only they are worth capturing.
        self._may_capture = all(size == 1 for symbol, size in sizes.items() if symbol != "B")
        self._ran = False
        self._replay: Callable[[], None] | None = None

    def _bind_caches(self) -> None:
        """Bind input and output of every cache to the same memory."""
        buffers = self._caches.views(self._graph.caches)
        for part in self._graph.caches:
            address, size = self._device.mirror(buffers[part]), buffers[part].nbytes
            if address % _ALIGNMENT:  # a row that starts inside its batch's memory
                own = self._device.allocate(self, size)
                self._detours.append((own, address, size))
                address = own
            self._check(self._context.set_input_shape(f"{PAST}{part}", buffers[part].shape))
            self._check(self._context.set_tensor_address(f"{PAST}{part}", address))
            self._check(self._context.set_tensor_address(f"{PRESENT}{part}", address))

    def fits(self, inputs: dict[str, Array], caches: Caches) -> bool:
        """Return whether it is bound to these caches and to inputs of these shapes."""
        return (
            caches.buffers is self._caches.buffers
            and caches.key == self._caches.key
            and all(value.shape == self._inputs[name].shape for name, value in inputs.items())
        )

    def run(self, inputs: dict[str, Array], *, lasting: bool) -> dict[str, Array]:
        """Run with these values and return the results, as copies if ``lasting``."""
        for name, value in inputs.items():
            self._inputs[name][...] = value
            self._device.copy_in(self._addresses[name], self._inputs[name])
        if self._replay is not None:
            self._replay()
        else:
            self._launch()
        for name, value in self._results.items():
            self._device.copy_out(value, self._addresses[name])
        self._device.wait()
        if not self._ran and self._may_capture:
            # Only after the first run, in which TensorRT allocates memory: an allocation would end the capture.
            self._replay = self._device.capture(self, self._launch)
        self._ran = True
        return {name: value.copy() for name, value in self._results.items()} if lasting else self._results

    def _launch(self) -> None:
        for own, address, size in self._detours:
            self._device.copy(own, address, size)
        self._check(self._context.execute_async_v3(self._device.stream))
        for own, address, size in self._detours:
            self._device.copy(address, own, size)

    def _check(self, good: bool) -> None:
        if not good:
            raise _failure(self._graph, self._log)


def _refit(trt: Any, engine: Any, graph: Graph, weights: Path, log: Log) -> None:
    """Load the weights of an ONNX file into a stripped engine; data files are in the ONNX file's directory."""
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)  # owns the weights until they are on the GPU
    if not parser.refit_from_file(str(weights)):
        reason = parser_refusal(parser, log)
    elif not refitter.refit_cuda_engine():
        reason = log.refusal()
    else:
        return
    raise DynexportError(
        f"graph {graph.name}: TensorRT cannot give its engine the weights of {weights}: {reason}; build one that has "
        "its own with: dynexport build, without --strip"
    )


def _failure(graph: Graph, log: Log) -> DynexportError:
    return DynexportError(f"graph {graph.name}: TensorRT failed in a step: {log.refusal()}")


__all__ = ["TensorRtEngine"]
