"""The GPU's memory, one stream, and CUDA graphs: as much of the CUDA runtime as a decoder needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from dynexport.runtime.errors import DynexportError, require_module

Array = np.ndarray


class Device:
    """The current GPU, with a stream of its own.

    Attributes:
        stream: its handle.

    Args:
        extra: what to install where cuda-python is missing.
        cuda: the module ``cuda.bindings.runtime``, or what stands for it.

    Raises:
        DynexportError: when cuda-python is not installed, or CUDA gives no stream.
    """

    def __init__(self, extra: str, cuda: Any = None) -> None:
        self._cuda: Any = cuda or require_module("cuda.bindings.runtime", extra, "run engines")
        self.stream = int(self._call("cudaStreamCreate"))
        self._mirrors: dict[int, int] = {}

    def allocate(self, owner: object, size: int) -> int:
        """The address of so many zeroed bytes, freed when their owner is.

        Raises:
            DynexportError: when there is not enough memory.
        """
        address = int(self._call("cudaMalloc", max(1, size)))
        weakref.finalize(owner, self._cuda.cudaFree, address)
        self._call("cudaMemsetAsync", address, 0, max(1, size), self.stream)
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

    def wait(self) -> None:
        """Until everything in the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        """What ``launch`` puts into the stream, as a CUDA graph to launch; None where it cannot be captured."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            launch()
        except DynexportError:
            self._cuda.cudaStreamEndCapture(self.stream)
            return None
        try:
            graph = self._call("cudaStreamEndCapture", self.stream)
            executable = self._call("cudaGraphInstantiate", graph, 0)
        except DynexportError:
            return None
        return lambda: self._call("cudaGraphLaunch", executable, self.stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, function)(*arguments)
        if int(error):
            _, text = self._cuda.cudaGetErrorString(error)
            raise DynexportError(f"{function}: CUDA error {int(error)}: {text.decode(errors='replace')}")
        return values[0] if values else None


__all__ = ["Device"]
