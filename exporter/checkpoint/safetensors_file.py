"""A reader of single safetensors tensors into their own memory.

The safetensors library maps the file, and every page that it has read counts as memory of this process.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.plain_files import open_plain

# The limit of the safetensors library.
_LARGEST_HEADER = 100_000_000
_DTYPES: dict[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """One safetensors file.

    Args:
        path: the file; its header is read and checked at once, its tensors are read later.

    Raises:
        DynexportError: when the header is damaged or does not fit the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = _read_header(path)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of this file."""
        return self._entries[name].shape

    def stored_type(self, name: str) -> str:
        """Return the name of a tensor's dtype as the file has it, such as BF16."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Return a tensor of this file as float32.

        Raises:
            DynexportError: when its dtype is none of F32, F16, BF16 and F64, or the file has changed since it
                was opened.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise DynexportError(
                f"{self.path}: tensor {name}: expected dtype {', '.join(_DTYPES)}, found {entry.dtype}; "
                "it is quantised or damaged, use the model in one of these"
            )
        count = math.prod(entry.shape)
        try:
            values = np.fromfile(self.path, _DTYPES[entry.dtype], count, offset=entry.offset)
        except OSError as error:
            raise DynexportError(f"{self.path}: tensor {name}: cannot be read ({error.strerror})") from error
        if values.size != count:
            raise DynexportError(
                f"{self.path}: tensor {name}: expected {count} values, found {values.size}; "
                "the file has changed since it was opened"
            )
        return values.astype(np.float32, copy=False).reshape(entry.shape)


def _read_header(path: Path) -> dict[str, _Entry]:
    """Return the entry of each tensor, after the safetensors library has checked sizes, offsets and gaps."""
    with open_plain(path, "a safetensors file") as file:
        try:
            with safe_open(path, framework="numpy"):
                pass
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = parse_json_object(file.read(length), "its header")
            if unprintable := [name for name in header if not name.isprintable()]:
                raise ValueError(f"expected printable names, found {unprintable[0]!r}")
        except (SafetensorError, OSError, ValueError, DynexportError) as error:
            size = os.fstat(file.fileno()).st_size
            raise DynexportError(
                f"{path}: expected a safetensors file, found {size} bytes that are not one "
                f"({str(error)!r:.200}); it is damaged or incomplete, download it again"
            ) from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(value["dtype"], tuple(value["shape"]), 8 + length + value["data_offsets"][0])
        for name, value in header.items()
    }
