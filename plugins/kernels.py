"""Compile the CUDA kernels with the user's nvcc, and describe the launch of each kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from onnx_ir import DataType

from dynexport.plugins.operators import CAPACITY_TOP_K, GATED_SCATTER_ADD, RAGGED_KV_APPEND, SELECTED_MATMUL
from dynexport.plugins.schema import Operator, T
from dynexport.runtime.bundle.errors import DynexportError

SOURCE = Path(__file__).parent / "cuda" / "kernels.cu"
# Kernels use 32-bit indices.
LARGEST = 1 << 30
ARCHITECTURES = ("80", "89", "90", "120")

_SUFFIXES = {DataType.FLOAT: "float32", DataType.FLOAT16: "float16", DataType.BFLOAT16: "bfloat16"}


@dataclass(frozen=True)
class Launch:
    """The launch of an operator's kernel; its arguments are all inputs, 32-bit sizes, all outputs.

    Attributes:
        operator: the operator.
        kernel: base name of the kernel.
        sizes: letters of the dimensions that are passed as sizes.
        grid: letters of the dimensions whose product is the number of blocks.
        threads: number of threads per block.
        tile: number of indices that one block handles, for letters of the grid with more than one.
    """

    operator: Operator
    kernel: str
    sizes: str
    grid: str
    threads: int
    tile: Mapping[str, int]

    def name(self, dtype: DataType | None) -> str:
        """Return the kernel's name in the compiled file; ``dtype`` is the type of ``T``, None if there is no ``T``."""
        return self.kernel if dtype is None else f"{self.kernel}_{_SUFFIXES[dtype]}"

    def blocks(self, sizes: Mapping[str, int]) -> int:
        """Return the number of blocks for these dimensions."""
        return prod(-(-sizes[letter] // self.tile.get(letter, 1)) for letter in self.grid)


LAUNCHES = {
    launch.operator.name: launch
    for launch in (
        Launch(CAPACITY_TOP_K, "dynexport_capacity_top_k", "SK", "B", 1024, {}),
        Launch(GATED_SCATTER_ADD, "dynexport_gated_scatter_add", "SHK", "BK", 256, {}),
        Launch(RAGGED_KV_APPEND, "dynexport_ragged_kv_append", "hMKD", "BhK", 128, {}),
        Launch(SELECTED_MATMUL, "dynexport_selected_matmul", "LJK", "NJ", 256, {"J": 8}),
    )
}


def read_sizes(operator: Operator, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return the size of each dimension letter, from the inputs' shapes.

    Raises:
        DynexportError: when a shape does not fit the operator.
    """
    sizes: dict[str, int] = {}
    for tensor, shape in zip(operator.inputs, shapes, strict=True):
        if len(shape) != len(tensor.dims):
            raise DynexportError(f"{operator.name}: {tensor.name} has shape {list(shape)}, expected {tensor.dims}")
        for letter, size in zip(tensor.dims, shape, strict=True):
            if size > LARGEST:
                raise DynexportError(
                    f"{operator.name}: {letter} of {tensor.name} is {size}, expected {LARGEST} at most"
                )
            if sizes.setdefault(letter, size) != size:
                said = f"{letter} of {tensor.name} is {size}, expected {sizes[letter]} as of the inputs before it"
                raise DynexportError(f"{operator.name}: {said}")
    if operator is CAPACITY_TOP_K and sizes["K"] > sizes["S"]:
        raise DynexportError(f"{operator.name}: {sizes['K']} slots for {sizes['S']} scores, expected no more slots")
    return sizes


def compile_kernels(output: Path, *, architectures: Sequence[str] = ARCHITECTURES) -> Path:
    """Compile all kernels into a fat binary: machine code for these architectures, and PTX of the last for later GPUs.

    Args:
        output: the file to write.
        architectures: compute capabilities without the dot, ascending, such as "80".

    Returns:
        ``output``.

    Raises:
        DynexportError: when there is no nvcc, or it fails.
    """
    codes = [f"arch=compute_{number},code=sm_{number}" for number in architectures[:-1]]
    last = architectures[-1]
    codes.append(f"arch=compute_{last},code=[sm_{last},compute_{last}]")
    return _run_nvcc(output, "-fatbin", *(f"-gencode={code}" for code in codes))


def compile_ptx(output: Path, *, architecture: str = "80") -> Path:
    """Compile all kernels to PTX of the oldest architecture, which every later GPU can run; return ``output``.

    Raises:
        DynexportError: when there is no nvcc, or it fails.
    """
    return _run_nvcc(output, "-ptx", f"-arch=compute_{architecture}")


def find_nvcc() -> str:
    """Return the path of nvcc: from $CUDACXX, $CUDA_HOME, $PATH or /usr/local/cuda, in this order.

    Raises:
        DynexportError: when there is none.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX"), f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    for found in (shutil.which(candidate) for candidate in candidates if candidate):
        if found:
            return found
    raise DynexportError("nvcc is needed to compile the kernels and was not found: install CUDA, or set CUDA_HOME")


def _run_nvcc(output: Path, *options: str) -> Path:
    command = [find_nvcc(), "-std=c++17", "-O3", "--Werror", "all-warnings", *options, str(SOURCE), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise DynexportError(f"nvcc failed on {SOURCE.name} with exit code {done.returncode}: {said[0]}")
    return output


def dtype_of(operator: Operator, dtypes: Sequence[DataType]) -> DataType | None:
    """Return the type of ``T`` for inputs of these types; None if the operator has no ``T``."""
    found = (dtype for tensor, dtype in zip(operator.inputs, dtypes, strict=True) if tensor.dtype == T)
    return next(found, None)


__all__ = [
    "ARCHITECTURES",
    "LARGEST",
    "LAUNCHES",
    "SOURCE",
    "Launch",
    "compile_kernels",
    "compile_ptx",
    "dtype_of",
    "find_nvcc",
    "read_sizes",
]
