"""Writing a model's weights: one tensor at a time from the checkpoint to the bundle's data file, hashed on the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from dynexport.exporter.architecture import Architecture, Source
from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families import Family
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.layers import stored_weights
from dynexport.exporter.targets.target import Target
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import File

# Page alignment lets ONNX Runtime map a tensor straight from the file.
_ALIGNMENT = 4096
Progress = Callable[[str, int, int], None]


@dataclass
class WeightReader:
    """Tensors of the graph from the tensors of a checkpoint, checked."""

    checkpoint: Checkpoint
    family: Family
    architecture: Architecture

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The float32 tensor that the graph calls ``name``.

        Raises:
            DynexportError: when it is absent, has another shape, or holds NaN or infinity.
        """
        source = self.architecture.sources.get(name, Source((name,)))
        try:
            value = source.build(self._read_part)
        except (ValueError, IndexError) as error:
            parts = (self.checkpoint.shape(self._stored_name(part)) for part in source.names)
            raise self._wrong_shape(source, shape, *parts) from error
        if value.shape != shape:
            raise self._wrong_shape(source, shape, value.shape)
        return value

    def _wrong_shape(self, source: Source, shape: tuple[int, ...], *found: tuple[int, ...]) -> DynexportError:
        return DynexportError(
            f"{self.checkpoint.source}: tensor {', '.join(source.names)}: expected shape {list(shape)} as config.json "
            f"says, found {', '.join(str(list(part)) for part in found)}"
        )

    def _read_part(self, name: str) -> np.ndarray:
        value = self.checkpoint.read(self._stored_name(name))
        if not np.isfinite(value).all():
            raise DynexportError(
                f"{self.checkpoint.source}: tensor {name}: expected finite numbers, found NaN or infinity; the "
                "checkpoint is damaged"
            )
        return value

    def _stored_name(self, name: str) -> str:
        """Checkpoints of a bare model leave out the prefix that the model with a head has."""
        bare = name.removeprefix(self.family.base_prefix)
        return bare if name not in self.checkpoint.names and bare in self.checkpoint.names else name


class WeightFile:
    """The external data file of a bundle's graphs. Use as a context manager.

    Args:
        path: where it is written.
        target: for which engine; some widen float16 when they load it.
        progress: called with the tensor just written, how many are done, and how many there are in the graph.

    Attributes:
        written: parameter name -> where it lies, shared by every graph of the bundle.
        bytes_read: parameter name -> bytes that reading all of it costs at run time.
        elements: weights written, counted before quantisation.
    """

    def __init__(self, path: Path, target: Target, progress: Progress | None = None) -> None:
        self._path, self._target, self._progress = path, target, progress
        self._hash = hashlib.sha256()
        self.written: dict[str, ir.ExternalTensor] = {}
        self.bytes_read: dict[str, int] = {}
        self.elements = 0

    def __enter__(self) -> WeightFile:
        self._file: BinaryIO = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entry(self) -> File:
        """Size and hash of what was written."""
        return File(sha256=self._hash.hexdigest(), bytes=self._path.stat().st_size)

    def store(self, model: CausalLM, reader: WeightReader) -> None:
        """Give every parameter of a graph its place in the file; write those that are not there yet."""
        weights = list(stored_weights(model))
        for done, (name, weight) in enumerate(weights, start=1):
            if any(parameter.name not in self.written for parameter in weight.parts.values()):
                with np.errstate(over="ignore"):  # told below
                    values = weight.storage.pack(reader.read(name, weight.shape))
                if not all(np.isfinite(part).all() for part in values.values() if part.dtype == np.float16):
                    raise DynexportError(
                        f"{reader.checkpoint.source}: tensor {name}: expected weights up to 65504 for float16, found "
                        "larger ones; choose another precision"
                    )
                for suffix, parameter in weight.parts.items():
                    self._append(parameter.name, values[suffix])
                self.elements += math.prod(weight.shape)
                if self._progress is not None:
                    self._progress(name, done, len(weights))
            for parameter in weight.parts.values():
                parameter.const_value = self.written[parameter.name]

    def _append(self, name: str, value: np.ndarray) -> None:
        self._write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        dtype = ir.DataType.from_numpy(value.dtype)
        self._write(_as_stored(value, dtype))
        self.written[name] = ir.ExternalTensor(
            self._path.name,
            offset,
            self._file.tell() - offset,
            dtype,
            shape=ir.Shape(value.shape),
            name=name,
            base_dir=self._path.parent,
        )
        self.bytes_read[name] = math.ceil(value.size * self._target.bits_read(dtype) / 8)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)


def _as_stored(value: np.ndarray, dtype: ir.DataType) -> bytes | memoryview:
    """The bytes of an external tensor, little-endian; two numbers of 4 bits share one."""
    if dtype.bitwidth < 8:
        return ir.tensor(value).tobytes()
    return np.ascontiguousarray(value).view(np.uint8).data
