"""The bundle's weight file: tensors are read from the checkpoint, packed, written and hashed one at a time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from dynexport.exporter.bundle.options import Progress
from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.checkpoint.blocks import Blocks, stack
from dynexport.exporter.families import Family
from dynexport.exporter.families.architecture import Architecture, Source
from dynexport.exporter.graph.decoder import POOL, CausalLM
from dynexport.exporter.graph.layers import stored_weights
from dynexport.exporter.lowering.blocks import OfPieces, Piece, Segment
from dynexport.exporter.lowering.experts import ExpertBlocks
from dynexport.exporter.lowering.storage import Stacked, StoredWeight
from dynexport.exporter.lowering.target import Target
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import File

# Page alignment lets ONNX Runtime map a tensor straight from the file.
_ALIGNMENT = 4096
EMBEDDING, HEAD, LAYERS = "model.embed_tokens.weight", "lm_head.weight", "model.layers."
# Returns the values of a weight's parameters, by suffix, for the weight's name, storage and float32 values.
Pack = Callable[[str, StoredWeight, np.ndarray], dict[str, np.ndarray]]


@dataclass
class Changes:
    """Differences between the values of packed blocks and the checkpoint's.

    Attributes:
        errors: stored type -> largest difference from the checkpoint's values, in scales of a block.
        experts: (stored type, whether the values are the checkpoint's own) -> number of matrices of experts in 8 bits.
    """

    errors: dict[str, float] = field(default_factory=dict)
    experts: Counter[tuple[str, bool]] = field(default_factory=Counter)


@dataclass
class WeightReader:
    """A reader of the graphs' weights from a checkpoint's tensors, with checks of shapes and values."""

    checkpoint: Checkpoint
    family: Family
    architecture: Architecture

    def needed(self, model: CausalLM) -> set[str]:
        """Return the names of all checkpoint tensors that a graph needs, without reading them.

        Raises:
            DynexportError: when the checkpoint lacks one of them.
        """
        names: set[str] = set()
        for name, weight in stored_weights(model):
            for single in _names(name, weight):
                source = self.architecture.sources.get(single, Source((single,)))
                names.update(map(self._stored_name, source.names))
        for name in sorted(names - set(self.checkpoint.names)):
            self.checkpoint.shape(name)  # raises: it is absent
        return names

    def stored_names(self, name: str) -> list[str]:
        """Return the names of the checkpoint tensors of a graph tensor; empty if any of them is absent."""
        source = self.architecture.sources.get(name, Source((name,)))
        names = [self._stored_name(part) for part in source.names]
        return names if all(name in self.checkpoint.names for name in names) else []

    def segments(self, name: str, shape: tuple[int, ...]) -> list[Segment]:
        """Return how the checkpoint stores the rows of a matrix of the graph, neighbours of one type as one segment.

        Raises:
            DynexportError: when the checkpoint lacks one of its tensors.
        """
        source = self.architecture.sources.get(name, Source((name,)))
        names = tuple(map(self._stored_name, source.names))
        if source.combine is not None:
            (stored,) = names if source.moves_rows else (None,)
            form = None if stored is None else self.checkpoint.form(stored)
            return [Segment(shape[0], self.checkpoint.stored_type(names[0]), form, names)]
        found: list[Segment] = []
        for part in names:
            rows, kind = self.checkpoint.shape(part)[0], self.checkpoint.stored_type(part)
            above = found.pop() if found and found[-1].kind == kind else Segment(0, kind, None, ())
            found.append(Segment(above.rows + rows, kind, self.checkpoint.form(part), (*above.names, part)))
        return found

    def stored_types(self, name: str) -> list[str]:
        """Return the stored type of each checkpoint tensor of a graph tensor."""
        source = self.architecture.sources.get(name, Source((name,)))
        return [self.checkpoint.stored_type(self._stored_name(part)) for part in source.names]

    def parts(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
        """Return the checkpoint's matrices that a matrix of the graph consists of: names and numbers of rows."""
        source = self.architecture.sources.get(name, Source((name,)))
        if source.combine is not None:
            return [(name, shape[0])]
        return [(part, self.checkpoint.shape(self._stored_name(part))[0]) for part in source.names]

    def pieces(self, name: str, shape: tuple[int, ...]) -> list[Piece]:
        """Return the segments of a matrix: blocks where they have a form, else float32 rows; errors as for ``read``."""
        source = self.architecture.sources.get(name, Source((name,)))
        try:
            found = [self._piece(segment, source) for segment in self.segments(name, shape)]
        except (ValueError, IndexError) as error:
            parts = (self.checkpoint.shape(self._stored_name(part)) for part in source.names)
            raise self._wrong_shape(source, shape, *parts) from error
        rows = sum(piece.shape[0] for piece in found)
        if rows != shape[0] or any(piece.shape[1:] != shape[1:] for piece in found):
            raise self._wrong_shape(source, shape, *(piece.shape for piece in found))
        return found

    def _piece(self, segment: Segment, source: Source) -> Piece:
        if segment.form is None:
            return Source(segment.names, source.combine, item=source.item).build(self._read_part, self._read_item)
        (blocks,) = stack([self._read_blocks(part) for part in segment.names])
        return blocks if source.combine is None else blocks.move_rows(_of_one(source.combine))

    def _read_blocks(self, name: str) -> Blocks:
        blocks = self.checkpoint.blocks(name)
        assert blocks is not None
        if not all(part is None or np.isfinite(part).all() for part in (blocks.scale, blocks.minimum)):
            raise self._not_finite(name)
        return blocks

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the graph tensor ``name``, float32 of shape ``shape``.

        Raises:
            DynexportError: when it is absent, has another shape, or holds NaN or infinity.
        """
        source = self.architecture.sources.get(name, Source((name,)))
        try:
            value = source.build(self._read_part, self._read_item)
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
        return self._finite(name, self.checkpoint.read(self._stored_name(name)))

    def _read_item(self, name: str, item: int) -> np.ndarray:
        return self._finite(name, self.checkpoint.read_item(self._stored_name(name), item))

    def _finite(self, name: str, value: np.ndarray) -> np.ndarray:
        if not np.isfinite(value).all():
            raise self._not_finite(name)
        return value

    def _not_finite(self, name: str) -> DynexportError:
        return DynexportError(
            f"{self.checkpoint.source}: tensor {name}: expected finite numbers, found NaN or infinity; the "
            "checkpoint is damaged"
        )

    def _stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor: a bare model's names have no prefix."""
        candidates = (name, name.removeprefix(self.family.base_prefix), self.family.renamed.get(name, name))
        return next((candidate for candidate in candidates if candidate in self.checkpoint.names), name)


class WeightFile:
    """The external data file of a bundle's graphs. Use as a context manager.

    Args:
        path: the file to write.
        target: the engine that reads the weights; some widen float16 when they load it.
        progress: a function called with the name of the tensor just written, the number of weights done, and the
            number of weights in the graph.
        pack: computes the values of a weight's parameters; by default its storage does.

    Attributes:
        written: parameter name -> external tensor, shared by all graphs of the bundle; a stack of layers and each layer
            in it have entries.
        bytes_read: parameter name -> number of bytes that a run reads for the whole parameter.
        elements: the number of weights written, counted before quantisation.
        changes: what packing changed of the values of blocks.
    """

    def __init__(self, path: Path, target: Target, progress: Progress | None = None, pack: Pack | None = None) -> None:
        self._path, self._target, self._progress = path, target, progress
        self._packed = _as_stored_by_itself if pack is None else pack
        self._hash = hashlib.sha256()
        self.written: dict[str, ir.ExternalTensor] = {}
        self.bytes_read: dict[str, int] = {}
        self.elements = 0
        self.changes = Changes()

    def __enter__(self) -> WeightFile:
        self._file: BinaryIO = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entry(self) -> File:
        """Return the size and the hash of the file."""
        return File(sha256=self._hash.hexdigest(), bytes=self._path.stat().st_size)

    def store(self, model: CausalLM, reader: WeightReader) -> None:
        """Set every parameter of a graph to its external tensor; write those that are not in the file yet."""
        weights = list(stored_weights(model))
        for done, (name, weight) in enumerate(weights, start=1):
            if any(name + suffix not in self.written for suffix in weight.parts):
                if isinstance(weight.storage, Stacked):
                    self._pack_stack(name, weight, weight.storage, reader)
                else:
                    self._pack(name, weight, reader)
                if self._progress is not None:
                    self._progress(name, done, len(weights))
            for suffix, parameter in weight.parts.items():
                parameter.const_value = self.written[name + suffix]

    def _pack(self, name: str, weight: StoredWeight, reader: WeightReader) -> None:
        values = self._checked_values(name, weight, reader)
        for suffix in weight.parts:
            self._append(name + suffix, values[suffix])

    def _checked_values(self, name: str, weight: StoredWeight, reader: WeightReader) -> dict[str, np.ndarray]:
        """Return the values of a weight's parameters; ``name`` is that of the graph's weight, or of one in a stack."""
        with np.errstate(over="ignore"):  # reported below
            values = self._values(name, weight, reader)
        if not all(np.isfinite(part).all() for part in values.values() if part.dtype == np.float16):
            raise DynexportError(
                f"{reader.checkpoint.source}: tensor {name}: expected weights up to 65504 for float16, found "
                "larger ones; choose another precision"
            )
        self.elements += math.prod(weight.shape)
        return values

    def _values(self, name: str, weight: StoredWeight, reader: WeightReader) -> dict[str, np.ndarray]:
        if not isinstance(weight.storage, OfPieces):
            read = reader.read(name, weight.shape)
            values = self._packed(name, weight, read)
            if isinstance(weight.storage, ExpertBlocks) and weight.storage.single.bits == 8:
                kept = weight.storage.holds(read, values)
                self.changes.experts.update((kind, kept) for kind in reader.stored_types(name))
            return values
        packed = weight.storage.pack_pieces(reader.pieces(name, weight.shape))
        for kind, error in packed.errors.items():
            self.changes.errors[kind] = max(error, self.changes.errors.get(kind, 0.0))
        return packed.values

    def _pack_stack(self, name: str, weight: StoredWeight, storage: Stacked, reader: WeightReader) -> None:
        """Write every layer's weight under its own name, without gaps, so that together they are the stack."""
        names, single, (first, *others) = _names(name, weight), replace(weight, storage=storage.single), weight.parts
        # The first part is the largest; the others wait until it has been written for all layers.
        waiting: dict[str, list[np.ndarray]] = {suffix: [] for suffix in others}
        for layer in names:
            values = self._checked_values(layer, single, reader)
            self._append(layer + first, values[first], aligned=layer == names[0])
            for suffix in others:
                waiting[suffix].append(values[suffix])
        for suffix, stack_of_part in waiting.items():
            for layer, value in zip(names, stack_of_part, strict=True):
                self._append(layer + suffix, value, aligned=layer == names[0])
        for suffix in weight.parts:
            part = self.written[names[0] + suffix]
            assert part.offset is not None and part.length is not None
            shape = (storage.layers, *part.shape.numpy())
            self._place(name + suffix, part.offset, storage.layers * part.length, part.dtype, shape)

    def _append(self, name: str, value: np.ndarray, *, aligned: bool = True) -> None:
        if aligned:
            self._write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        dtype = ir.DataType.from_numpy(value.dtype)
        self._write(_as_stored(value, dtype))
        self._place(name, offset, self._file.tell() - offset, dtype, value.shape)
        self.bytes_read[name] = math.ceil(value.size * self._target.bits_read(dtype) / 8)

    def _place(self, name: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
        """Record the place of a parameter in the file."""
        self.written[name] = ir.ExternalTensor(
            self._path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self._path.parent
        )

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)


def _as_stored_by_itself(_: str, weight: StoredWeight, values: np.ndarray) -> dict[str, np.ndarray]:
    return weight.storage.pack(values)


def _names(name: str, weight: StoredWeight) -> list[str]:
    """Return the graph's name of a weight; for stacked layers, one name per layer."""
    if not isinstance(weight.storage, Stacked):
        return [name]
    return [name.replace(f".{POOL}.", f".{layer}.") for layer in range(weight.storage.layers)]


def _of_one(combine: Callable[[list[np.ndarray]], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda value: combine([value])


def _as_stored(value: np.ndarray, dtype: ir.DataType) -> bytes | memoryview:
    """Return the bytes of an external tensor, little-endian; two 4-bit numbers share a byte."""
    if dtype.bitwidth < 8:
        return ir.tensor(value).tobytes()
    return np.ascontiguousarray(value).view(np.uint8).data
