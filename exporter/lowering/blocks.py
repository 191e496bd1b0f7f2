"""Storage of a checkpoint's own blocks of integers, for MatMulNBits and GatherBlockQuantized.

MatMulNBits computes scale * (q - z) with whole z. Blocks without minima fit as they are. A minimum m becomes
z = round(-m / scale), and what remains of it, at most half a scale, is a weight on the sum of the block's inputs: the
product gets further columns, whose inputs are these sums. The columns are quantised too, in as many stages as make the
rest negligible: each stage holds what the one before has left. Why: docs/architecture.md, "The blocks of a GGUF".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from dynexport.exporter.checkpoint.blocks import Array, Blocks, Form
from dynexport.exporter.lowering.storage import Storage, StoredWeight, joined_nibbles, parameter

# Stages of the columns by stored bits: each divides what is left by 14 or 254.
_STAGES = {4: 2, 8: 1}
Piece = Blocks | Array


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a weight that the checkpoint stores in one type.

    Attributes:
        rows: the number of rows.
        kind: the name of the stored type.
        form: the form of its blocks; None for a type without.
        names: the checkpoint tensors that hold the rows.
    """

    rows: int
    kind: str
    form: Form | None
    names: tuple[str, ...]


class Unnamed(Storage):
    """The storage of a weight until its name is known; it has no parameters."""

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        return {}

    def pack(self, weight: Array) -> dict[str, Array]:
        raise NotImplementedError("the weight's storage was not chosen")


@dataclass(frozen=True)
class Packed:
    """The values of a weight's parameters.

    Attributes:
        values: by suffix of the tensor's name.
        errors: stored type -> largest difference from the checkpoint's values, in scales of a block.
    """

    values: dict[str, Array]
    errors: dict[str, float]


class OfPieces(Storage):
    """A storage that takes the checkpoint's own blocks."""

    @abstractmethod
    def pack_pieces(self, pieces: Sequence[Piece]) -> Packed:
        """Return the values of the parameters, computed from the blocks or float32 rows of each segment."""

    def pack(self, weight: Array) -> dict[str, Array]:
        return self.pack_pieces([weight]).values


@dataclass(frozen=True)
class SumColumns:
    """The columns of a product that multiply the sums of the input's blocks.

    The sums of all ``count`` blocks are repeated ``copies`` times after the input. Blocks of ``size`` columns do not
    end where the copies end, so each stage takes whole blocks until it has met every sum; a column that it does not
    need has the weight 0.

    Attributes:
        count: the number of blocks of the input.
        size: the number of columns in a block.
        stages: the number of stages.
    """

    count: int
    size: int
    stages: int

    @cached_property
    def places(self) -> list[Array]:
        """The sum that each column of a stage multiplies, int64 [columns]; -1 for a weight of 0."""
        at, stages = 0, []
        for _ in range(self.stages):
            sums: list[Array] = []
            missing = np.ones(self.count, bool)
            while missing.any():
                block = (at + np.arange(self.size)) % self.count
                first = np.zeros(self.size, bool)
                first[np.unique(block, return_index=True)[1]] = True
                sums.append(np.where(first & missing[block], block, -1))
                missing[block] = False
                at += self.size
            stages.append(np.concatenate(sums))
        return stages

    @property
    def copies(self) -> int:
        """Number of copies of the sums after the input."""
        return -(-sum(len(stage) for stage in self.places) // self.count)

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.copies * self.count

    @property
    def blocks(self) -> int:
        """The number of blocks that hold the columns."""
        return -(-self.width // self.size)


@dataclass(frozen=True)
class Blocked(OfPieces):
    """Storage as the integers and scales of the checkpoint's blocks (layout of MatMulNBits).

    Weight [N, K] becomes ``_quantized`` uint8 [N, blocks, size * bits / 8], ``_scales`` float32 [N, blocks], and with
    minima ``_zero_points`` uint8 [N, ceil(blocks * bits / 8)]; the blocks of the sums' columns stand after those of K.
    """

    form: Form

    @property
    def bits(self) -> int:
        """The bits of a stored integer: 4 where every value fits, else 8."""
        fits = self.form.minima or self.form.zero == 2 ** (self.form.bits - 1)
        return 4 if self.form.bits <= 4 and fits else 8

    @property
    def block_size(self) -> int:
        return self.form.size

    def sums(self, columns: int) -> SumColumns | None:
        """Return the columns after the weight's own ``columns``; None without minima."""
        if not self.form.minima:
            return None
        return SumColumns(columns // self.form.size, self.form.size, _STAGES[self.bits])

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        rows, columns = shape
        sums = self.sums(columns)
        blocks = columns // self.form.size + (0 if sums is None else sums.blocks)
        values = {
            "_quantized": parameter([rows, blocks, self.form.size * self.bits // 8], ir.DataType.UINT8),
            "_scales": parameter([rows, blocks]),
        }
        if sums is not None:
            values["_zero_points"] = parameter([rows, -(-blocks * self.bits // 8)], ir.DataType.UINT8)
        return values

    def pack_pieces(self, pieces: Sequence[Piece]) -> Packed:
        (blocks,) = pieces
        assert isinstance(blocks, Blocks)
        if blocks.minimum is None:
            q = (blocks.q.astype(np.int16) - blocks.zero + 2 ** (self.bits - 1)).astype(np.uint8)
            return Packed({"_quantized": self._joined(q), "_scales": blocks.scale}, {blocks.kind: 0.0})
        return self._pack_minima(blocks, blocks.minimum)

    def _pack_minima(self, blocks: Blocks, minimum: Array) -> Packed:
        sums = self.sums(blocks.shape[1])
        assert sums is not None
        finer = 2 ** (self.bits - self.form.bits)
        middle = 2 ** (self.bits - 1)
        scale, q = blocks.scale / np.float32(finer), blocks.q * np.uint8(finer)
        # A block of one value is that value times 1.
        constant = scale == 0
        scale = np.where(constant, np.abs(minimum), scale)
        q = np.where(constant[..., None], np.uint8(middle), q)
        steps, offsets = scale.astype(np.float64), minimum.astype(np.float64)
        zeros = np.rint(-offsets / np.where(steps == 0, 1, steps)).clip(0, 2 * middle - 1)
        zeros = np.where(constant, middle - np.sign(offsets), zeros)
        left = np.where(constant, 0, offsets + zeros * steps)
        extra = [_stage(left, places, self.block_size, middle - 1) for places in sums.places]
        spare = sums.blocks - sum(part.shape[1] for _, part in extra)
        extra.append((np.zeros((len(q), spare, self.block_size), np.int16), np.zeros((len(q), spare), np.float32)))
        whole = np.concatenate([q, *((part + middle).astype(np.uint8) for part, _ in extra)], axis=1)
        scales = np.concatenate([scale, *(part for _, part in extra)], axis=1)
        zeros = np.concatenate([zeros, np.full((len(q), sums.blocks), middle)], axis=1).astype(np.uint8)
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.where(constant, 0, np.abs(left) / np.abs(blocks.scale))
        values = {"_quantized": self._joined(whole), "_scales": scales, "_zero_points": self._joined(zeros)}
        return Packed(values, {blocks.kind: float(errors.max())})

    def _joined(self, integers: Array) -> Array:
        """Return integers uint8 [.., n] as they are stored."""
        return integers if self.bits == 8 else joined_nibbles(integers)


def _stage(left: Array, places: Array, size: int, largest: int) -> tuple[Array, Array]:
    """Quantise one stage of the sums' columns, and subtract it from ``left``.

    Args:
        left: what remains of each block's minimum, float64 [N, count]; changed in place.
        places: the sum of each column, or -1.
        size: the columns of a block.
        largest: the largest integer.

    Returns:
        Integers int16 [N, blocks, size] and scales float32 [N, blocks].
    """
    used = places >= 0
    wanted = np.where(used, left[:, places], 0).reshape(len(left), -1, size)
    scale = (np.abs(wanted).max(axis=2) / largest).astype(np.float32)
    steps = np.where(scale == 0, 1, scale).astype(np.float64)[..., None]
    q = np.rint(wanted / steps).clip(-largest, largest)
    left[:, places[used]] -= (q * scale[..., None]).reshape(len(left), -1)[:, used]
    return q.astype(np.int16), scale


@dataclass(frozen=True)
class Rows(OfPieces):
    """Storage of a weight whose rows are stored in several ways, one part over the other."""

    parts: tuple[tuple[int, Storage], ...]

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        return {
            f".{i}{suffix}": value
            for i, (rows, storage) in enumerate(self.parts)
            for suffix, value in storage.parameters([rows, *shape[1:]]).items()
        }

    def split(self, weight: StoredWeight) -> list[StoredWeight]:
        """Return the parts of a weight as weights of their own."""
        found = []
        for i, (rows, storage) in enumerate(self.parts):
            prefix = f".{i}"
            parts = {k.removeprefix(prefix): v for k, v in weight.parts.items() if k.startswith(prefix)}
            found.append(StoredWeight((rows, *weight.shape[1:]), storage, parts))
        return found

    def pack_pieces(self, pieces: Sequence[Piece]) -> Packed:
        packed = Packed({}, {})
        for i, ((_, storage), piece) in enumerate(zip(self.parts, pieces, strict=True)):
            part = pack_piece(storage, piece)
            packed.values.update({f".{i}{suffix}": value for suffix, value in part.values.items()})
            for kind, error in part.errors.items():
                packed.errors[kind] = max(error, packed.errors.get(kind, 0.0))
        return packed


def pack_piece(storage: Storage, piece: Piece) -> Packed:
    """Return the values of a storage's parameters for one piece."""
    if isinstance(storage, OfPieces):
        return storage.pack_pieces([piece])
    assert not isinstance(piece, Blocks)
    return Packed(storage.pack(piece), {})


__all__ = ["Blocked", "OfPieces", "Packed", "Piece", "Rows", "Segment", "SumColumns", "Unnamed", "pack_piece"]
