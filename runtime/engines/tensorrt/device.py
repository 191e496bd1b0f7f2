"""The part of the CUDA runtime that decoding needs: device memory, one stream, CUDA graphs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError, require_module

Array = np.ndarray
_NO_MEMORY = 2


class Device:
    """The current GPU, with a stream of its own.

    Attributes:
        stream: handle of the stream.
        turn: lock that a thread holds while its run uses the stream.

    Args:
        extra: extra of dynexport that installs cuda-python, for the error if it is missing.

    Raises:
        DynexportError: when cuda-python is not installed, or CUDA gives no stream.
    """

    def __init__(self, extra: str) -> None:
        cuda: Any = require_module("cuda.bindings.runtime", extra, "run engines")
        self._cuda = cuda
        self.stream = int(self._call("cudaStreamCreate"))
        weakref.finalize(self, cuda.cudaStreamDestroy, self.stream)
        self._mirrors: dict[int, int] = {}
        self.turn = threading.Lock()

    def allocate(self, owner: object, size: int) -> int:
        """Return the address of ``size`` zeroed bytes, aligned to 256, freed when their owner is collected.

        Raises:
            DynexportError: when there is not enough memory.
        """
        size = max(1, size)
        address = int(self._call("cudaMalloc", size))
        weakref.finalize(owner, self._cuda.cudaFree, address)
        self._call("cudaMemsetAsync", address, 0, size, self.stream)
        return address

    def mirror(self, array: Array) -> int:
        """Return the address of the device memory that mirrors a host array; it is zeroed at first.

        Views of one array share device memory as they share host memory, so a row's cache is a part of the batch's.
        """
        owner = array if array.base is None else array.base
        if id(owner) not in self._mirrors:
            self._mirrors[id(owner)] = self.allocate(owner, owner.nbytes)
            weakref.finalize(owner, self._mirrors.pop, id(owner))
        return self._mirrors[id(owner)] + array.ctypes.data - owner.ctypes.data

    def copy_in(self, address: int, array: Array) -> None:
        """Copy host to device in the stream; the array is contiguous and must not change before ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def copy_out(self, array: Array, address: int) -> None:
        """Copy device to host in the stream; the array is valid after ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy device to device in the stream."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, source, size, kind, self.stream)

    def wait(self) -> None:
        """Wait until all work in the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, owner: object, launch: Callable[[], None]) -> Callable[[], None] | None:
        """Capture the work that ``launch`` enqueues as a CUDA graph; return the function that launches the graph.

        Args:
            owner: object whose collection destroys the graph.
            launch: function that enqueues the work.

        Returns:
            The function, or None if the work cannot be captured.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        refused = False
        try:
            launch()
        except DynexportError:
            refused = True
        try:
            # Also after a failure: only this call ends the capture.
            graph = self._call("cudaStreamEndCapture", self.stream)
            if refused:
                return None
            executable = self._call("cudaGraphInstantiate", graph, 0)
            self._call("cudaGraphDestroy", graph)
        except DynexportError:
            return None
        weakref.finalize(owner, self._cuda.cudaGraphExecDestroy, executable)
        return lambda: self._call("cudaGraphLaunch", executable, self.stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, function)(*arguments)
        if not int(error):
            return values[0] if values else None
        self._cuda.cudaGetLastError()  # clear it, or the next call would report it again
        if int(error) == _NO_MEMORY:
            raise DynexportError(
                f"{function}: the GPU has not enough memory; lower the batch, or convert with a smaller --max-length"
            )
        _, text = self._cuda.cudaGetErrorString(error)
        raise DynexportError(f"{function}: CUDA error {int(error)}: {text.decode(errors='replace')}")


__all__ = ["Device"]
