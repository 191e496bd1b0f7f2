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
        return self._values(name, self._dtype(name), entry.offset, entry.shape).astype(np.float32, copy=False)

    def read_item(self, name: str, item: int) -> np.ndarray:
        """Return one entry along a tensor's first axis, as ``read``; an IndexError where there is none."""
        return self._item(name, item, self._dtype(name)).astype(np.float32, copy=False)

    def read_bytes(self, name: str, item: int) -> np.ndarray:
        """Return one entry along the first axis of a tensor of bytes, uint8; errors as for ``read_item``."""
        if (found := self._entries[name].dtype) != "U8":
            raise DynexportError(f"{self.path}: tensor {name}: expected dtype U8, found {found}")
        return self._item(name, item, np.dtype(np.uint8))

    def _dtype(self, name: str) -> Any:
        found = self._entries[name].dtype
        if found not in _DTYPES:
            raise DynexportError(
                f"{self.path}: tensor {name}: expected dtype {', '.join(_DTYPES)}, found {found}; "
                "it is quantised or damaged, use the model in one of these"
            )
        return _DTYPES[found]

    def _item(self, name: str, item: int, dtype: Any) -> np.ndarray:
        entry = self._entries[name]
        if not entry.shape or not 0 <= item < entry.shape[0]:
            raise IndexError(item)
        size = math.prod(entry.shape[1:]) * dtype.itemsize
        return self._values(name, dtype, entry.offset + item * size, entry.shape[1:])

    def _values(self, name: str, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        count = math.prod(shape)
        try:
            values = np.fromfile(self.path, dtype, count, offset=offset)
        except OSError as error:
            raise DynexportError(f"{self.path}: tensor {name}: cannot be read ({error.strerror})") from error
        if values.size != count:
            raise DynexportError(
                f"{self.path}: tensor {name}: expected {count} values, found {values.size}; "
                "the file has changed since it was opened"
            )
        return values.reshape(shape)


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
