"""Lowering for ONNX Runtime with dynexport's CPU operators, which read blocks and 16-bit weights (docs/plugins.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from dynexport.exporter.lowering.blocks import Segment
from dynexport.exporter.lowering.interleaved import (
    Interleaved,
    InterleavedBlocks,
    InterleavedHalves,
    KeptBlocks,
    RoundedBlocks,
    SearchedInterleaved,
)
from dynexport.exporter.lowering.onnxruntime import OnnxRuntime
from dynexport.exporter.lowering.storage import Plain, Storage, StoredWeight
from dynexport.plugins.graph import add_functions

_HALVES = {"fp16": InterleavedHalves(ir.DataType.FLOAT16), "bf16": InterleavedHalves(ir.DataType.BFLOAT16)}
_BY_TYPE = {"F16": _HALVES["fp16"], "BF16": _HALVES["bf16"]}
_ROUNDED = {"int8": RoundedBlocks(bits=8, zero=128), "int4": SearchedInterleaved()}


class PluggedOnnxRuntime(OnnxRuntime):
    """The ONNX Runtime target, with the CPU operators for all matrices that they can read."""

    storages: Mapping[str, Storage] = {**OnnxRuntime.storages, **_HALVES, **_ROUNDED}
    nearest = RoundedBlocks(bits=4, zero=8)

    @property
    def selects_weights(self) -> bool:  # type: ignore[override]
        """Whether the layers' weights are of one form: a GGUF's blocks may differ from layer to layer."""
        return self.precision != "gguf"

    def finish(self, model: ir.Model) -> None:
        add_functions(model)

    def bits_read(self, dtype: ir.DataType) -> int:
        """Return the bits read per element, which is used as it is stored."""
        return dtype.bitwidth

    def fitting(self, storage: Storage, shape: Sequence[int]) -> Storage:
        columns = shape[1]
        if isinstance(storage, InterleavedBlocks) and columns % storage.block_size:
            return OnnxRuntime.storages[f"int{storage.bits}"]
        return Plain() if isinstance(storage, InterleavedHalves) and columns % 2 else storage

    def storage_of(self, segment: Segment, columns: int) -> Storage:
        if segment.form is not None:
            return KeptBlocks.of(segment.form) or super().storage_of(segment, columns)
        if segment.kind in _BY_TYPE:
            return Plain() if columns % 2 else _BY_TYPE[segment.kind]
        return super().storage_of(segment, columns)

    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        if isinstance(weight.storage, Interleaved):
            return self._like(weight.storage.multiply(op, x, weight), x, weight.shape[0])
        return super().matmul(op, x, weight)

    def gather_rows(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        if isinstance(weight.storage, Interleaved):
            return weight.storage.look_up(op, indices, weight)
        return super().gather_rows(op, indices, weight)


__all__ = ["PluggedOnnxRuntime"]
