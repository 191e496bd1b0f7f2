"""Find the library of CPU kernels (plugins/cpu), which ONNX Runtime loads for dynexport's CPU operators."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# The path of the library; empty: use none, and run the operators' bodies.
VARIABLE = "DYNEXPORT_CPU_OPERATORS"
NAME = "libdynexport_cpu.so"
OPERATORS = (
    "BlockAfterAttention",
    "BlockGather",
    "BlockMatMul",
    "BlockNormMatMul",
    "CachedAttention",
    "ChooseLayer",
    "GatherTokens",
    "HalfAfterAttention",
    "HalfGather",
    "HalfMatMul",
    "HalfNormMatMul",
    "RouteTokens",
    "ScatterGated",
    "SelectedAddNorm",
    "SelectedBlockMatMul",
    "SelectedFloatMatMul",
    "SelectedHalfMatMul",
    "SelectedNorm",
)
# The package that ships the library, and where `make operators` puts it.
_PACKAGE = "dynexport_cpu"
_BUILT = Path(__file__).parent / "cpu" / "lib"


@dataclass(frozen=True)
class CpuLibrary:
    """A library of CPU kernels that was found.

    Attributes:
        path: the file.
        version: the version that it was built as.
        kernels: the instruction set that its kernels use here, such as ``avx512-vnni``.
    """

    path: Path
    version: str
    kernels: str


def find_library() -> CpuLibrary | str:
    """Return the library, or in one line why there is none."""
    return _found(os.environ.get(VARIABLE))


@cache
def _found(told: str | None) -> CpuLibrary | str:
    if told == "":
        return f"turned off by {VARIABLE}"
    package = None if told else find_spec(_PACKAGE)
    folders = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    places = [Path(told)] if told else [folder / NAME for folder in (*folders, _BUILT)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return f"expected a file at {told} ({VARIABLE}), found none" if told else "not installed"
    return _opened(path.resolve())


def _opened(path: Path) -> CpuLibrary | str:
    try:
        library = ctypes.CDLL(str(path))
        version, kernels = library.dynexport_cpu_version, library.dynexport_cpu_kernels
    except (OSError, AttributeError) as error:
        return f"{path}: expected dynexport's CPU operators, found: {error}"
    version.restype = kernels.restype = ctypes.c_char_p
    used = kernels()
    if used is None:
        return f"{path}: DYNEXPORT_CPU_KERNELS names kernels that do not run here"
    return CpuLibrary(path, version().decode(), used.decode())


__all__ = ["NAME", "OPERATORS", "VARIABLE", "CpuLibrary", "find_library"]
