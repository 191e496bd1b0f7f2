"""Find the GPU by asking the driver library, without any Python package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device.

    Attributes:
        name: the driver's name of the GPU model.
        compute_capability: compute capability, such as "8.9".
        cuda: newest CUDA version that the driver supports, such as "13.0".
    """

    name: str
    compute_capability: str
    cuda: str

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.compute_capability}, CUDA {self.cuda}"


@dataclass(frozen=True)
class NoGpu:
    """The result without a GPU, with the reason."""

    reason: str


def find_gpu() -> Gpu | NoGpu:
    """Return the GPU that an engine would run on, or the reason that there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return NoGpu("no NVIDIA driver: libcuda.so.1 is not found")
    try:
        _call(driver, "cuInit", 0)
        return _first(driver)
    except _CudaError as error:
        return NoGpu(str(error))


class _CudaError(Exception):
    pass


def _first(driver: ctypes.CDLL) -> Gpu:
    version, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise _CudaError("the driver shows no device; see CUDA_VISIBLE_DEVICES")
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", cuda)


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise _CudaError(f"{function}: CUDA error {code}: {(text.value or b'unknown').decode(errors='replace')}")
