"""A GGUF file of llama.cpp, read as the Hugging Face checkpoint that it was converted from."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np
from gguf.quants import dequantize, quant_shape_to_byte_shape

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.checkpoint.blocks import Blocks, Form
from dynexport.exporter.checkpoint.gguf_blocks import form_of, unpack
from dynexport.exporter.checkpoint.gguf_config import read_config
from dynexport.exporter.checkpoint.gguf_header import GgufTensor
from dynexport.exporter.checkpoint.gguf_layout import FAMILIES, GgufFamily
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
        self._stored = self._family.hugging_face_names(self._header.tensors, layers, path)
        self.config = read_config(metadata, self._family, self._read_stored)
        tokenizer = tokenizer_files(metadata, build=build_tokenizer)
        self.files, self.notes = tokenizer.files, (*metadata.notes, *tokenizer.notes)

    @property
    def names(self) -> Collection[str]:
        """Hugging Face names of all tensors."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DynexportError when there is none of that name."""
        return self._header.tensors[self._stored_name(name)].shape

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32 in Hugging Face's layout.

        Raises:
            DynexportError: when it is absent or unreadable, its type cannot be dequantised, or its shape contradicts
                the metadata.
        """
        stored = self._stored_name(name)
        return self._hugging_face_rows(name, stored, self._read_stored(stored))

    def form(self, name: str) -> Form | None:
        """Return the form of ``blocks``; None for a tensor of another number of dimensions, or without such blocks."""
        tensor = self._header.tensors[self._stored_name(name)]
        return form_of(tensor.kind) if len(tensor.shape) == 2 else None

    def stored_type(self, name: str) -> str:
        """Return the ggml type of a tensor."""
        return str(self._header.tensors[self._stored_name(name)].kind.name)

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix as the file's blocks of integers, in Hugging Face's order of rows.

        Returns:
            The blocks; None for a tensor without a form.

        Raises:
            DynexportError: when it is absent or unreadable, or its shape contradicts the metadata.
        """
        if self.form(name) is None:
            return None
        stored = self._stored_name(name)
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

    def _stored_name(self, name: str) -> str:
        stored: str | None = self._stored.get(name)
        if stored is None:
            raise DynexportError(
                f"{self.source}: no tensor {name} among its {len(self._stored)}; the file is not a complete "
                f"{self._family.architecture}"
            )
        return stored

    def _read_stored(self, stored: str) -> np.ndarray:
        """Return a tensor by its GGUF name, float32, in GGUF's layout."""
        tensor = self._header.tensors[stored]
        try:
            return _dequantise(self._read_bytes(stored), tensor)
        except NotImplementedError as error:
            raise DynexportError(
                f"{tensor.path}: tensor {stored}: {tensor.kind.name} cannot be dequantised; use a file of another "
                "quantisation or the Hugging Face directory"
            ) from error

    def _read_bytes(self, stored: str) -> np.ndarray:
        """Return the stored bytes of a tensor, uint8."""
        tensor = self._header.tensors[stored]
        path = tensor.path
        try:
            content = np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)
        except OSError as error:
            raise DynexportError(f"{path}: tensor {stored}: cannot be read ({error.strerror})") from error
        if content.size != tensor.size:
            raise DynexportError(
                f"{path}: tensor {stored}: expected {tensor.size} bytes, found {content.size}; "
                "the file has changed since it was opened"
            )
        return content


def _dequantise(content: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    """Return the values of a tensor, float32; in groups of rows, because the gguf package makes two copies."""
    width = tensor.shape[-1] if tensor.shape else 1
    values = np.empty((math.prod(tensor.shape) // max(width, 1), width), np.float32)
    rows = content.reshape(len(values), *quant_shape_to_byte_shape((width,), tensor.kind))
    step = max(1, _VALUES_AT_A_TIME // max(width, 1))
    for start in range(0, len(rows), step):
        values[start : start + step] = dequantize(rows[start : start + step], tensor.kind)
    return values.reshape(tensor.shape)


def _find_family(metadata: Metadata) -> GgufFamily:
    """Return the family of a file. Raises DynexportError when it is unsupported, or the file is not a model."""
    path = metadata.header.path
    kind = metadata.optional("general.type", str, "a string") or "model"
    if kind != "model":
        raise DynexportError(
            f"{path}: general.type: expected model, found {kind!r:.40}; name the .gguf file of a whole model, with "
            "any adapter merged into it"
        )
    family = FAMILIES.get(metadata.architecture)
    if family is None:
        raise DynexportError(
            f"{path}: general.architecture: expected one of {', '.join(sorted(FAMILIES))}, found "
            f"{metadata.architecture!r}; convert the Hugging Face directory instead"
        )
    return family
