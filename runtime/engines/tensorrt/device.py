"""The GPU's memory, one stream, and CUDA graphs: as much of the CUDA runtime as a decoder needs."""

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
        stream: its handle.
        turn: the lock of the thread whose run is in the stream.

    Args:
        extra: what to install where cuda-python is missing.

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
        """The address of so many zeroed bytes, freed when their owner is; at a multiple of 256.

        Raises:
            DynexportError: when there is not enough memory.
        """
        size = max(1, size)
        address = int(self._call("cudaMalloc", size))
        weakref.finalize(owner, self._cuda.cudaFree, address)
        self._call("cudaMemsetAsync", address, 0, size, self.stream)
        return address

    def mirror(self, array: Array) -> int:
        """The address of the device memory that stands for an array's; zeros at first.

        Views of one array share memory here as they do on the host, so that a row's cache is a part of its batch's.
        """
        owner = array if array.base is None else array.base
        if id(owner) not in self._mirrors:
            self._mirrors[id(owner)] = self.allocate(owner, owner.nbytes)
            weakref.finalize(owner, self._mirrors.pop, id(owner))
        return self._mirrors[id(owner)] + array.ctypes.data - owner.ctypes.data

    def copy_in(self, address: int, array: Array) -> None:
        """Host to device, in the stream; the array is contiguous and stays as it is until ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def copy_out(self, array: Array, address: int) -> None:
        """Device to host, in the stream; there after ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Device to device, in the stream."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, source, size, kind, self.stream)

    def wait(self) -> None:
        """Until everything in the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, owner: object, launch: Callable[[], None]) -> Callable[[], None] | None:
        """What ``launch`` puts into the stream, as a CUDA graph to launch; it lives as long as its owner.

        Returns:
            None where it cannot be captured.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        refused = False
        try:
            launch()
        except DynexportError:
            refused = True
        try:
            # In any case: it is what takes the stream out of capturing.
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
        self._cuda.cudaGetLastError()  # CUDA would tell the next one who asks
        if int(error) == _NO_MEMORY:
            raise DynexportError(
                f"{function}: the GPU has not enough memory; lower the batch, or convert with a smaller --max-length"
            )
        _, text = self._cuda.cudaGetErrorString(error)
        raise DynexportError(f"{function}: CUDA error {int(error)}: {text.decode(errors='replace')}")


__all__ = ["Device"]
