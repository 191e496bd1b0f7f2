"""Where arrays lie when kernels run on them: on a GPU, or on the host for kernels that run there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.plugins.driver import LIBRARY


class Host:
    """The host's own memory."""

    def put(self, array: NDArray[Any]) -> int:
        self._kept = [*getattr(self, "_kept", []), array]
        return array.ctypes.data

    def get(self, pointer: int, like: NDArray[Any]) -> NDArray[Any]:
        return like

    def free(self) -> None:
        self._kept = []


class Gpu:
    """Memory of the first GPU; raises OSError where there is none."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL(LIBRARY)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        for call in (
            lambda: self._cuda.cuInit(0),
            lambda: self._cuda.cuDeviceGet(ctypes.byref(device), 0),
            lambda: self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            lambda: self._cuda.cuCtxSetCurrent(context),
        ):
            self._check(call)
        self._held: list[ctypes.c_uint64] = []

    def put(self, array: NDArray[Any]) -> int:
        pointer = ctypes.c_uint64()
        self._check(lambda: self._cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 1))))
        self._held.append(pointer)
        size = ctypes.c_size_t(array.nbytes)
        self._check(lambda: self._cuda.cuMemcpyHtoD_v2(pointer, ctypes.c_void_p(array.ctypes.data), size))
        return pointer.value

    def get(self, pointer: int, like: NDArray[Any]) -> NDArray[Any]:
        found = np.empty_like(like)
        place = ctypes.c_void_p(found.ctypes.data)
        self._check(lambda: self._cuda.cuCtxSynchronize())
        size = ctypes.c_size_t(found.nbytes)
        self._check(lambda: self._cuda.cuMemcpyDtoH_v2(place, ctypes.c_uint64(pointer), size))
        return found

    def free(self) -> None:
        for pointer in self._held:
            self._check(lambda pointer=pointer: self._cuda.cuMemFree_v2(pointer))
        self._held = []

    def _check(self, call: Callable[[], int]) -> None:
        if code := call():
            raise OSError(f"CUDA error {code}")


__all__ = ["Gpu", "Host"]
