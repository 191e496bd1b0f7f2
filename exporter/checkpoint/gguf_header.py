"""A reader of a GGUF file's metadata and tensor table.

It is used instead of ``gguf.GGUFReader``, which takes seconds for a vocabulary, trusts the counts of a damaged file,
and maps the whole file.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import open_plain

# Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. In versions 2 and 3 all counts are 64 bits wide.
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4
# Limits of one array, and of the bytes before the tensors. Large vocabularies have a million entries in some 50 MB.
_MOST_ITEMS, _LARGEST_HEADER = 1 << 24, 1 << 28


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table.

    Attributes:
        path: the file that holds the tensor.
        kind: the ggml type of the stored values.
        shape: the sizes of the dimensions, outermost first, as in numpy.
        offset: the position of its first byte in the file.
        size: its number of bytes.
    """

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata and the tensor table, which precede the tensors.

    Attributes:
        path: the file.
        metadata: the value of each key: a number, bool or string, or a list of one of these.
        tensors: the row of each tensor, by name; all its bytes are inside its file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Return whether a file starts with GGUF's magic bytes. Raises DynexportError when it cannot be read."""
    with open_plain(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read and check everything but the tensors.

    Raises:
        DynexportError: when the file is not GGUF of a supported version, or is damaged or truncated.
    """
    try:
        with open_plain(path, "a GGUF file") as file:
            return _read(_Cursor(file, path, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise DynexportError(f"{path}: cannot be read ({error.strerror})") from error


class _Cursor:
    """A reader of successive values, which never reads past the end of the file.

    Args:
        file: the open file, at its start.
        path: its path, for messages.
        size: its number of bytes.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self.path, self.size = file, path, size
        self.position = 0

    def error(self, message: str) -> DynexportError:
        """Return an error that names the position in the file."""
        return DynexportError(
            f"{self.path}: byte {self.position}: {message}; the file is damaged or incomplete, download it again"
        )

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count > self.size - self.position:
            raise self.error(f"expected {count} more bytes, found {self.size - self.position}")
        if self.position + count > _LARGEST_HEADER:
            raise self.error(f"expected at most {_LARGEST_HEADER} bytes before the tensors, found more")
        content = self._file.read(count)
        self.position += count
        return content

    def number(self, layout: str) -> int:
        """Return the next integer; ``layout`` is a letter of the struct module."""
        return int(struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))[0])

    def string(self) -> str:
        """Return the next string: its length, then its UTF-8 bytes."""
        content = self.take(self.number("Q"))
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"expected UTF-8 text, found {content[:20]!r}") from error

    def name(self) -> str:
        """Return the next string. Raises DynexportError when it is not printable, because messages quote it."""
        name = self.string()
        if not name.isprintable():
            raise self.error(f"expected a printable name, found {name!r:.80}")
        return name

    def value(self) -> Any:
        """Return the next metadata value: its type, then its content."""
        kind = self.number("I")
        if kind == _ARRAY:
            return self._array()
        return self.string() if kind == _STRING else self._scalars(kind, 1)[0]

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST_ITEMS:
            raise self.error(f"expected an array of at most {_MOST_ITEMS} items, found {count}")
        if kind == _STRING:
            # Each string takes at least 8 bytes, so a false count stops at the end of the file.
            return [self.string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self.error(f"expected a metadata type of {sorted(_SCALARS)} or {_STRING}, found {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _FLOAT32:
            # The shortest decimal with the same float32 is the one that was meant: 1e-05, not 9.999999747378752e-06.
            return [float(str(value)) for value in values]
        items: list[Any] = values.tolist()
        return items


def _read(cursor: _Cursor) -> GgufHeader:
    _check_version(cursor)
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.name()
        if key in metadata:
            raise cursor.error(f"metadata key {key!r}: expected it once, found it twice")
        metadata[key] = cursor.value()
    rows: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = cursor.name()
        if name in rows:
            raise cursor.error(f"tensor {name!r}: expected it once, found it twice")
        rows[name] = _read_row(cursor, name)
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    start = _align(cursor, alignment)
    tensors = {name: _place(cursor, name, start, *row) for name, row in rows.items()}
    _check_side_by_side(cursor, start, alignment, tensors)
    return GgufHeader(cursor.path, metadata, tensors)


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.take(min(4, cursor.size))
    if magic != _MAGIC:
        raise DynexportError(f"{cursor.path}: expected a GGUF file, found one that starts with {magic!r}")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise DynexportError(f"{cursor.path}: big-endian GGUF is not supported; convert the Hugging Face directory")
    if version not in _VERSIONS:
        raise DynexportError(
            f"{cursor.path}: expected GGUF version {' or '.join(map(str, _VERSIONS))}, found {version}; "
            "write it again with a current llama.cpp"
        )


def _read_row(cursor: _Cursor, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    """Return a tensor's type, its shape (outermost first) and its offset from the start of the tensor data."""
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name}: expected 1 to {_MAX_DIMENSIONS} dimensions, found {dimensions}")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.error(f"tensor {name}: expected dimensions from 1, found {list(shape)}")
    kind = cursor.number("I")
    try:
        return GGMLQuantizationType(kind), shape, cursor.number("Q")
    except ValueError as error:
        raise cursor.error(f"tensor {name}: expected a known ggml type, found {kind}") from error


def _align(cursor: _Cursor, alignment: Any) -> int:
    """Return the position where the tensor data starts."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment: expected a power of two, found {alignment!r}")
    return -(-cursor.position // alignment) * alignment


def _place(
    cursor: _Cursor, name: str, start: int, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int
) -> GgufTensor:
    """Return a row of the tensor table with its position in the file; ``start`` is where the tensor data starts."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise cursor.error(f"tensor {name}: expected rows of a multiple of {block} {kind.name}, found {shape[-1]}")
    size = math.prod(shape) // block * block_bytes
    if start + offset + size > cursor.size:
        raise DynexportError(
            f"{cursor.path}: tensor {name}: expected {size} bytes from byte {start + offset}, "
            f"found a file of {cursor.size} bytes; it is incomplete, download it again"
        )
    return GgufTensor(cursor.path, kind, shape, start + offset, size)


def _check_side_by_side(cursor: _Cursor, start: int, alignment: int, tensors: dict[str, GgufTensor]) -> None:
    """Raise DynexportError unless the aligned tensors fill the file to its end, without gaps or overlaps."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            found = "bytes of another tensor" if tensor.offset < end else "bytes of no tensor before it"
            raise DynexportError(
                f"{cursor.path}: tensor {name}: expected its start at byte {end}, found byte {tensor.offset}, with "
                f"{found}; the file is damaged, download it again"
            )
        end = -(-(tensor.offset + tensor.size) // alignment) * alignment
    if cursor.size > end:
        raise DynexportError(
            f"{cursor.path}: expected {end} bytes, found {cursor.size}, with bytes of no tensor at its end; the file "
            "is damaged, download it again"
        )
