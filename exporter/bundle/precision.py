"""The precision of a bundle where the user leaves it open, and what became of a GGUF's own values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dynexport.exporter.bundle.options import TargetOptions
from dynexport.exporter.bundle.weights import Changes, WeightReader
from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.layers import stored_weights
from dynexport.exporter.lowering.blocks import Blocked, OfPieces, Rows
from dynexport.exporter.lowering.interleaved import InterleavedBlocks, InterleavedHalves
from dynexport.exporter.lowering.storage import BlockQuantized, Stacked, Storage
from dynexport.runtime.bundle.manifest import Precision

# Weights of a small model, of which a decode step takes less than a millisecond (docs/architecture.md, GGUF blocks).
_SMALL = 1 << 22
# Types of safetensors with 16 bits.
_HALVES: dict[str, Precision] = {"BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class StoredMatrices:
    """The form in which a bundle stores the matrices of one type of a GGUF file.

    Attributes:
        kind: the type in the file.
        count: the number of matrices.
        stored: how the bundle stores them.
        error: the largest difference from the file's values, in scales of a block; 0 where none differs, None where
            the values were quantised again.
    """

    kind: str
    count: int
    stored: str
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            how = "quantised again"
        elif self.error == 0:
            how = "exact"
        else:
            how = f"integers and scales exact, minima to 1/{1 / self.error:.0f} of a scale"
        return f"{self.count} {self.kind} in {self.stored}, {how}"


def choose_precision(options: TargetOptions, checkpoint: Checkpoint) -> tuple[Precision, tuple[str, ...]]:
    """Return the precision of a bundle, and notes on what it does to a GGUF's quantised values."""
    forms = (checkpoint.form(name) for name in checkpoint.names)
    kinds = Counter(form.kind for form in forms if form is not None)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    if options.precision != "auto":
        return options.precision, _named_notes(options, found) if kinds else ()
    if not kinds:
        return _of_floats(options, checkpoint)
    if options.target != "onnxruntime":
        return "fp32", (
            f"precision: fp32, as TensorRT has no products of a GGUF's blocks ({found}); --precision fp16, int8 or "
            "int4 makes a smaller bundle of other values",
        )
    return "gguf", ()


def is_small(checkpoint: Checkpoint) -> bool:
    """Return whether rounding activations to int8 would save less than a millisecond of a decode step.

    So ``auto`` leaves them in float32, and the bundle computes what the file's own values give.
    """
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names) <= _SMALL


def _of_floats(options: TargetOptions, checkpoint: Checkpoint) -> tuple[Precision, tuple[str, ...]]:
    """Return as ``choose_precision``: 16 bits where all matrices have them and dynexport's operators read them."""
    types = {checkpoint.stored_type(name) for name in checkpoint.names if len(checkpoint.shape(name)) == 2}
    stored = _HALVES.get(next(iter(types))) if len(types) == 1 else None
    if stored is None or options.target != "onnxruntime":
        return "fp32", ()
    if options.plugins:
        return stored, ()
    return "fp32", (
        f"precision: fp32 holds the checkpoint's {stored} weights in twice their bytes, as ONNX Runtime has no "
        "products of 16 bits on CPUs; --plugins, with dynexport's operators, keeps them as they are",
    )


def _named_notes(options: TargetOptions, found: str) -> tuple[str, ...]:
    what = {
        "fp32": "keeps the values of the file's blocks in 4 to 8 times their bytes",
        "fp16": "rounds the values of the file's blocks to float16",
        "bf16": "rounds the values of the file's blocks to bfloat16",
        "int8": "quantises the values of the file's blocks a second time",
        "int4": "quantises the values of the file's blocks a second time, which can cost much quality",
    }[options.precision]
    advice = "" if options.target != "onnxruntime" else "; --precision auto keeps the blocks as they are"
    return (f"precision: {options.precision} {what} ({found}){advice}",)


def expert_notes(options: TargetOptions, precision: Precision, architecture: Architecture) -> tuple[str, ...]:
    """Return a note on a mixture of experts whose experts are not stored in the bundle's precision."""
    if architecture.experts is None or options.target != "onnxruntime":
        return ()
    if precision == "gguf":
        return (
            "precision: experts are stored in 8 bits, as ONNX Runtime has no products of experts in a GGUF's types: "
            "those of Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS and MXFP4 keep their values, others are quantised again",
        )
    if precision in ("fp16", "bf16"):
        return (
            f"precision: experts are stored in float32, in twice the bytes of {precision}, as ONNX Runtime's products "
            "of experts round their inputs and outputs to 16 bits too, and have no bf16; int8 makes them smaller",
        )
    return ()


def stored_matrices(reader: WeightReader, models: Sequence[CausalLM], changes: Changes) -> tuple[StoredMatrices, ...]:
    """Return what became of the matrices of each stored type, the most frequent first.

    Args:
        reader: the reader that the bundle's weights came from.
        models: the modules of all graphs.
        changes: as in ``WeightFile``.
    """
    count: Counter[tuple[str, str]] = Counter()
    again: set[str] = set()
    weights = {name: weight for model in models for name, weight in stored_weights(model)}
    if not any(isinstance(weight.storage, OfPieces) for weight in weights.values()):
        return ()
    for name, weight in weights.items():
        if len(weight.shape) != 2 or isinstance(weight.storage, Stacked):
            continue
        storages = weight.storage.parts if isinstance(weight.storage, Rows) else ((weight.shape[0], weight.storage),)
        for segment, (_, storage) in zip(reader.segments(name, weight.shape), storages, strict=True):
            count[segment.kind, _told(storage)] += len(segment.names)
            if isinstance(storage, BlockQuantized):
                again.add(segment.kind)
    return tuple(
        StoredMatrices(kind, number, stored, None if kind in again else changes.errors.get(kind, 0.0))
        for (kind, stored), number in count.most_common()
    ) + tuple(
        StoredMatrices(kind, number, "8 bits, blocks of 32 of experts", 0.0 if kept else None)
        for (kind, kept), number in changes.experts.most_common()
    )


def rounded_notes(matrices: Sequence[StoredMatrices]) -> tuple[str, ...]:
    """Return a note that names the types whose values were quantised again."""
    found = [each for each in matrices if each.error is None]
    if not found:
        return ()
    kinds = ", ".join(f"{each.count} {each.kind}" for each in found)
    return (f"precision: matrices were quantised again, to int8: {kinds}",)


def _told(storage: Storage) -> str:
    if isinstance(storage, InterleavedHalves):
        return storage.dtype.name.lower()
    if isinstance(storage, Blocked | BlockQuantized | InterleavedBlocks):
        return f"{storage.bits} bits, blocks of {storage.block_size}"
    (value,) = storage.parameters((1, 1)).values()
    return "float16" if value.dtype is not None and value.dtype.bitwidth == 16 else "float32"


__all__ = ["StoredMatrices", "choose_precision", "expert_notes", "is_small", "rounded_notes", "stored_matrices"]
