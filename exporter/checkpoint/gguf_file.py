"""A GGUF file of llama.cpp, read as the Hugging Face checkpoint that it was converted from."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf.quants import dequantize, quant_shape_to_byte_shape

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.checkpoint.blocks import Blocks, Form
from dynexport.exporter.checkpoint.gguf_blocks import form_of, unpack
from dynexport.exporter.checkpoint.gguf_config import read_config
from dynexport.exporter.checkpoint.gguf_families import ARCHITECTURES, family_of
from dynexport.exporter.checkpoint.gguf_header import GgufTensor
from dynexport.exporter.checkpoint.gguf_layout import GgufFamily, Place
from dynexport.exporter.checkpoint.gguf_metadata import Metadata
from dynexport.exporter.checkpoint.gguf_parts import read_parts
from dynexport.exporter.checkpoint.gguf_tokenizer import tokenizer_files
from dynexport.runtime.bundle.errors import DynexportError

_VALUES_AT_A_TIME = 1 << 22


class GgufFile(Checkpoint):
    """A GGUF file.

    Args:
        path: the file.
        source: the path that the user gave; None for ``path``.
        build_tokenizer: whether to make a ``tokenizer.json``; False if the user names another.

    Raises:
        DynexportError: when it is damaged or of an unsupported architecture, or parts of it are missing.
    """

    def __init__(self, path: Path, source: str | None = None, *, build_tokenizer: bool = True) -> None:
        self.source = str(path) if source is None else source
        self._header = read_parts(path)
        in_one_file = all(tensor.path == path for tensor in self._header.tensors.values())
        self.origin = path if in_one_file else None
        metadata = Metadata(self._header)
        self._family = _find_family(metadata)
        layers = metadata.integer("block_count")
        if layers > len(self._header.tensors):
            raise metadata.error(
                metadata.key("block_count"), f"at most {len(self._header.tensors)}, the number of tensors"
            )
        shapes = {name: tensor.shape for name, tensor in self._header.tensors.items()}
        self._places = self._family.hugging_face_names(shapes, layers, path)
        self.config = read_config(metadata, self._family, self._read_stored)
        tokenizer = tokenizer_files(metadata, build=build_tokenizer)
        self.files, self.notes = tokenizer.files, (*metadata.notes, *tokenizer.notes)

    @property
    def names(self) -> Collection[str]:
        """Hugging Face names of all tensors."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DynexportError when there is none of that name."""
        place = self._place(name)
        return place.shape([self._header.tensors[stored].shape for stored in place.stored])

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32 in Hugging Face's layout.

        Raises:
            DynexportError: when it is absent or unreadable, its type cannot be dequantised, or its shape contradicts
                the metadata.
        """
        return self._built(name, self._place(name))

    def read_item(self, name: str, item: int) -> np.ndarray:
        """Return one entry along the first axis of a tensor, as ``read``, without reading the others of experts."""
        place = self._place(name)
        if place.item is not None or any(len(self._header.tensors[stored].shape) != 3 for stored in place.stored):
            return super().read_item(name, item)
        return self._built(name, replace(place, item=item))

    def _built(self, name: str, place: Place) -> np.ndarray:
        try:
            values = place.build([self._read_stored(stored, place.item) for stored in place.stored])
        except ValueError as error:
            shapes = ", ".join(str(list(self._header.tensors[stored].shape)) for stored in place.stored)
            raise DynexportError(
                f"{self._header.path}: tensors {', '.join(place.stored)}: expected shapes that go together, found "
                f"{shapes}; the file is damaged, download it again"
            ) from error
        return self._hugging_face_rows(name, place.stored[0], values)

    def form(self, name: str) -> Form | None:
        """Return the form of ``blocks``; None for a tensor of another number of dimensions, or without such blocks."""
        place = self._place(name)
        tensor = self._header.tensors[place.stored[0]]
        return form_of(tensor.kind) if len(tensor.shape) == 2 and place.is_plain else None

    def stored_type(self, name: str) -> str:
        """Return the ggml type of a tensor."""
        return str(self._header.tensors[self._place(name).stored[0]].kind.name)

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix as the file's blocks of integers, in Hugging Face's order of rows.

        Returns:
            The blocks; None for a tensor without a form.

        Raises:
            DynexportError: when it is absent or unreadable, or its shape contradicts the metadata.
        """
        if self.form(name) is None:
            return None
        (stored,) = self._place(name).stored
        tensor = self._header.tensors[stored]
        found = unpack(self._read_bytes(stored).reshape(tensor.shape[0], -1), tensor.kind)
        return None if found is None else found.move_rows(partial(self._hugging_face_rows, name, stored))

    def _hugging_face_rows(self, name: str, stored: str, values: np.ndarray) -> np.ndarray:
        try:
            heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
            return self._family.to_hugging_face(name, values, heads, kv_heads)
        except ValueError as error:
            raise DynexportError(
                f"{self._header.path}: tensor {stored}: expected rows of {heads} heads ({kv_heads} of k) "
                f"of even size, found {values.shape[0]} rows; the file is damaged, download it again"
            ) from error

    def _place(self, name: str) -> Place:
        place: Place | None = self._places.get(name)
        if place is None:
            raise DynexportError(
                f"{self.source}: no tensor {name} among its {len(self._places)}; the file is not a complete "
                f"{self._family.architecture}"
            )
        return place

    def _read_stored(self, stored: str, item: int | None = None) -> np.ndarray:
        """Return a tensor by its GGUF name, or an entry along its first axis, float32, in GGUF's layout."""
        tensor = self._header.tensors[stored]
        try:
            return _dequantise(
                self._read_bytes(stored, item), tensor, tensor.shape if item is None else tensor.shape[1:]
            )
        except NotImplementedError as error:
            raise DynexportError(
                f"{tensor.path}: tensor {stored}: {tensor.kind.name} cannot be dequantised; use a file of another "
                "quantisation or the Hugging Face directory"
            ) from error

    def _read_bytes(self, stored: str, item: int | None = None) -> np.ndarray:
        """Return the stored bytes of a tensor, or of an entry along its first axis, uint8."""
        tensor = self._header.tensors[stored]
        path, size, offset = tensor.path, tensor.size, tensor.offset
        if item is not None:
            if not 0 <= item < tensor.shape[0]:
                raise IndexError(item)
            size //= tensor.shape[0]
            offset += item * size
        try:
            content = np.fromfile(path, np.uint8, size, offset=offset)
        except OSError as error:
            raise DynexportError(f"{path}: tensor {stored}: cannot be read ({error.strerror})") from error
        if content.size != size:
            raise DynexportError(
                f"{path}: tensor {stored}: expected {size} bytes, found {content.size}; "
                "the file has changed since it was opened"
            )
        return content


def _dequantise(content: np.ndarray, tensor: GgufTensor, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of a tensor, or of an entry of it, float32; in groups of rows: the package makes two copies."""
    width = shape[-1] if shape else 1
    values = np.empty((math.prod(shape) // max(width, 1), width), np.float32)
    rows = content.reshape(len(values), *quant_shape_to_byte_shape((width,), tensor.kind))
    step = max(1, _VALUES_AT_A_TIME // max(width, 1))
    for start in range(0, len(rows), step):
        values[start : start + step] = dequantize(rows[start : start + step], tensor.kind)
    return values.reshape(shape)


def _find_family(metadata: Metadata) -> GgufFamily:
    """Return the family of a file. Raises DynexportError when it is unsupported, or the file is not a model."""
    path = metadata.header.path
    kind = metadata.optional("general.type", str, "a string") or "model"
    if kind != "model":
        raise DynexportError(
            f"{path}: general.type: expected model, found {kind!r:.40}; name the .gguf file of a whole model, with "
            "any adapter merged into it"
        )
    family = family_of(metadata.architecture, metadata.header.tensors)
    if family is None:
        raise DynexportError(
            f"{path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, found "
            f"{metadata.architecture!r}; convert the Hugging Face directory instead"
        )
    return family
