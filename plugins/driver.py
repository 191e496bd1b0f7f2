"""Launch CUDA kernels with five calls of the driver's C interface, which is stable, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from dynexport.runtime.bundle.errors import DynexportError

LIBRARY = "libcuda.so.1"


class Kernels:
    """The kernels of a compiled file, loaded into the CUDA context that is current at the first launch.

    Args:
        path: a fat binary, cubin or PTX file.
        library: name of the driver library.

    Raises:
        DynexportError: when the file or the driver is missing.
    """

    def __init__(self, path: Path, *, library: str = LIBRARY) -> None:
        if not path.is_file():
            raise DynexportError(f"{path}: no such file: write it with dynexport.plugins.kernels.compile_kernels")
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise DynexportError(f"{library} cannot be loaded, is a CUDA driver installed? {error}") from error
        self._path = path
        self._modules: dict[int, ctypes.c_void_p] = {}
        self._functions: dict[tuple[int, str], ctypes.c_void_p] = {}

    def launch(
        self,
        name: str,
        blocks: int,
        threads: int,
        pointers: Sequence[int],
        sizes: Sequence[int],
        outputs: Sequence[int],
        stream: int,
    ) -> None:
        """Launch a kernel on a stream, without waiting for it.

        Args:
            name: name of the kernel in the file.
            blocks: number of blocks.
            threads: number of threads per block.
            pointers: device addresses of the inputs, the first arguments.
            sizes: 32-bit arguments after the inputs.
            outputs: device addresses of the outputs, the last arguments.
            stream: handle of the CUDA stream.

        Raises:
            DynexportError: when the driver returns an error.
        """
        values: list[ctypes.c_void_p | ctypes.c_int32] = [
            *map(ctypes.c_void_p, pointers),
            *map(ctypes.c_int32, sizes),
            *map(ctypes.c_void_p, outputs),
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid_and_block = map(ctypes.c_uint, (blocks, 1, 1, threads, 1, 1, 0))
        function = self._function(name)
        self._call("cuLaunchKernel", function, *grid_and_block, ctypes.c_void_p(stream), addresses, None)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes of device memory on a stream, without waiting."""
        places = ctypes.c_uint64(to), ctypes.c_uint64(source)
        self._call("cuMemcpyDtoDAsync_v2", *places, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def _function(self, name: str) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        key = context.value or 0
        if key not in self._modules:
            module = ctypes.c_void_p()
            # A ctypes string buffer ends with a zero byte, which PTX needs.
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.create_string_buffer(self._path.read_bytes()))
            self._modules[key] = module
        if (key, name) not in self._functions:
            function = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), self._modules[key], name.encode())
            self._functions[key, name] = function
        return self._functions[key, name]

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise DynexportError(f"{name} failed with CUDA error {code} on {self._path.name}")


__all__ = ["LIBRARY", "Kernels"]
