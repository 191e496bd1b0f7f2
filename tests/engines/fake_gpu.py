"""Stand-ins for CUDA and TensorRT that compute: device memory is the host's, and an engine is ONNX Runtime.

They are as strict as what they stand for, where it is known: nothing in a stream happens before somebody waits; memory
is checked for bounds and for use after it was freed; an address has to be a multiple of 256; a size has to fit the
profile; a CUDA graph repeats what was captured, and is of no use once its context was changed.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

ALIGNMENT = 256
NO_MEMORY, INVALID, NOT_CAPTURABLE = 2, 1, 900
TEXTS = {NO_MEMORY: b"out of memory", INVALID: b"invalid argument", NOT_CAPTURABLE: b"not permitted while capturing"}
STREAM = 7
Work = Callable[[], None]


class FakeCuda:
    """What ``cuda.bindings.runtime`` stands for.

    Attributes:
        size: bytes of memory that there are.
        errors: function -> code that it returns from now on.
        calls: how often each function was called.
        graphs: executable graphs that live.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.size, self.errors, self.calls = 1 << 40, dict[str, int](), dict[str, int]()
        self.memory: dict[int, tuple[Any, int]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.captured: dict[int, list[Work]] = {}
        self._queue: list[Work] = []
        self._capturing: list[Work] | None = None
        self._broken, self._numbers = False, count(1)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return (self.errors[name], None) if name in self.errors else found(*arguments)

        return call

    @property
    def used(self) -> int:
        return sum(size for _, size in self.memory.values())

    def enqueue(self, work: Work) -> None:
        """Put work into the stream."""
        if self._capturing is None:
            self._queue.append(work)
        else:
            self._capturing.append(work)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Device memory as an array."""
        content = np.empty(shape, dtype)
        self.check(address, content.nbytes)
        ctypes.memmove(content.ctypes.data, address, content.nbytes)
        return content

    def check(self, address: int, size: int) -> None:
        inside = any(start <= address and address + size <= start + held for start, (_, held) in self.memory.items())
        assert inside, f"{size} bytes at {address:#x} are no memory of the device"

    # Memory

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if self.used + size > self.size:
            return NO_MEMORY, None
        held = ctypes.create_string_buffer(b"\xff" * (size + ALIGNMENT), size + ALIGNMENT)
        address = -(-ctypes.addressof(held) // ALIGNMENT) * ALIGNMENT
        self.memory[address] = held, size
        return 0, address

    def cudaFree(self, address: int) -> tuple[int]:
        self._run()
        self.memory.pop(address)
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:
        assert stream == STREAM
        self.check(address, size)
        self.enqueue(lambda: ctypes.memset(address, value, size))
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream == STREAM
        for address in {1: [to], 2: [source], 3: [to, source]}[kind]:
            self.check(address, size)
        self.enqueue(lambda: ctypes.memmove(to, source, size))
        return (0,)

    # The stream

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream == STREAM
        if self._capturing is not None:
            self._broken = True
            return (NOT_CAPTURABLE,)
        self._run()
        return (0,)

    def _run(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    # Graphs

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self._capturing, self._broken = [], False
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        works, self._capturing = self._capturing, None
        if self._broken or works is None:
            return NOT_CAPTURABLE, None
        number = next(self._numbers)
        self.captured[number] = works
        return 0, number

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        number = next(self._numbers)
        self.graphs[number] = self.captured[graph]
        return 0, number

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        for work in self.graphs[executable]:
            self.enqueue(work)
        return (0,)

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        self.captured.pop(graph)
        return (0,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        self.graphs.pop(executable)
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, TEXTS.get(code, b"unknown error")


@dataclass
class FakeTensorRt:
    """What TensorRT's Python module stands for.

    Attributes:
        refuses: what it says of every engine, or None to take them.
        fails: what executions say from now on, or None.
        uncapturable: whether executions do what no capture survives.
        unreadable: what it says of files with weights, or None to take them.
        unfitting: what it says when weights are to go into an engine, or None to take them.
        refitted: files whose weights went into an engine.
        read: engines that it was given.
    """

    cuda: FakeCuda
    refuses: str | None = None
    fails: str | None = None
    uncapturable: bool = False
    unreadable: str | None = None
    unfitting: str | None = None
    refitted: list[Path] = field(default_factory=list)
    read: list[Path] = field(default_factory=list)
    contexts: int = 0
    __name__ = "tensorrt_rtx"

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    class ExecutionContextAllocationStrategy(IntEnum):
        STATIC = 0
        USER_MANAGED = 2

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self._deserialize(content, logger))

    def Refitter(self, engine: _Engine, logger: Any) -> _Refitter:
        return _Refitter(self, engine, logger)

    def OnnxParserRefitter(self, refitter: _Refitter, logger: Any) -> _ParserRefitter:
        return _ParserRefitter(self, refitter)

    def _deserialize(self, content: bytes, logger: Any) -> Any:
        told = json.loads(content)
        self.read.append(Path(told["model"]))
        if self.refuses is None:
            return _Engine(self, logger, told)
        logger.log(1, self.refuses)
        return None


def engine_content(model: Path, profiles: list[dict[str, list[list[int]]]], *, stripped: bool = False) -> bytes:
    """What the stand-in takes for a serialized engine.

    Args:
        profiles: of each, least, usual and greatest shape of every input with a symbol in its shape.
        stripped: whether it has to be given its weights.
    """
    return json.dumps({"model": str(model), "profiles": profiles, "stripped": stripped}).encode()


class _Engine:
    device_memory_size_v2 = 1000

    def __init__(self, trt: FakeTensorRt, logger: Any, told: dict[str, Any]) -> None:
        self.trt, self.logger, self.profiles = trt, logger, told["profiles"]
        self.session: Any = None if told["stripped"] else self.with_weights(told["model"])

    def with_weights(self, model: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def create_execution_context(self, strategy: int) -> _Context:
        assert strategy == FakeTensorRt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert self.session is not None, "the engine has no weights"
        self.trt.contexts += 1
        return _Context(self)


@dataclass
class _Refitter:
    trt: FakeTensorRt
    engine: _Engine
    logger: Any
    model: str | None = None

    def refit_cuda_engine(self) -> bool:
        assert self.model is not None, "it was given no weights"
        if self.trt.unfitting is not None:
            self.logger.log(1, self.trt.unfitting)
            return False
        self.engine.session = self.engine.with_weights(self.model)
        self.trt.refitted.append(Path(self.model))
        return True


@dataclass
class _ParserRefitter:
    trt: FakeTensorRt
    refitter: _Refitter

    @property
    def num_errors(self) -> int:
        return int(self.trt.unreadable is not None)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(node_operator=str, func=lambda: "refit", desc=lambda: self.trt.unreadable)

    def refit_from_file(self, model: str) -> bool:
        self.refitter.model = model
        return self.trt.unreadable is None


class _Context:
    """Shapes and addresses; changing either spoils the graphs that were captured from it."""

    def __init__(self, engine: _Engine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: dict[str, list[list[int]]] | None = None
        self.between: tuple[int, int] | None = None
        self.changes = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = self.engine.profiles[index]
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2 and not address % ALIGNMENT
        self.between = address, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, greatest = self.profile.get(name, [shape] * 3)
        self.changes += 1
        self.shapes[name] = tuple(shape)
        inside = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, greatest, strict=True))
        return inside or self._refuse(f"{name}: {shape} is not within the profile")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return not address % ALIGNMENT or self._refuse(f"{name}: {address:#x} is not aligned")

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM and self.between is not None
        self.trt.cuda.check(*self.between)
        if self.trt.fails is not None:
            return self._refuse(self.trt.fails)
        session = self.engine.session
        for tensor in (*session.get_inputs(), *session.get_outputs()):
            if tensor.name not in self.addresses:
                return self._refuse(f"{tensor.name}: no address is set")
        if self.trt.uncapturable:
            self.trt.cuda.cudaStreamSynchronize(stream)
        changes = self.changes

        def work() -> None:
            assert changes == self.changes, "the context was changed after its graph was captured"
            self._compute()

        self.trt.cuda.enqueue(work)
        return True

    def _compute(self) -> None:
        cuda, session = self.trt.cuda, self.engine.session
        feeds = {
            tensor.name: cuda.array(self.addresses[tensor.name], self.shapes[tensor.name], _numpy(tensor.type))
            for tensor in session.get_inputs()
        }
        names = [tensor.name for tensor in session.get_outputs()]
        for name, found in zip(names, session.run(names, feeds), strict=True):
            cuda.check(self.addresses[name], found.nbytes)
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(found).ctypes.data, found.nbytes)

    def _refuse(self, reason: str) -> bool:
        self.engine.logger.log(1, reason)
        return False


def _numpy(kind: str) -> Any:
    names = {"float": "float32", "double": "float64"}
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype(names.get(name, name))
