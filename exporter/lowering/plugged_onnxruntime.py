"""Lowering for ONNX Runtime with dynexport's CPU operators, which read blocks and 16-bit weights (docs/plugins.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.lowering.blocks import Segment
from dynexport.exporter.lowering.cached_attention import attend, rotates
from dynexport.exporter.lowering.fusion import fuse
from dynexport.exporter.lowering.interleaved import (
    Interleaved,
    InterleavedBlocks,
    InterleavedHalves,
    KeptBlocks,
    RoundedBlocks,
    SearchedInterleaved,
)
from dynexport.exporter.lowering.onnxruntime import OnnxRuntime, Segments
from dynexport.exporter.lowering.storage import Plain, Storage, StoredWeight
from dynexport.exporter.lowering.target import AttentionInputs
from dynexport.plugins.graph import add_functions
from dynexport.plugins.routes import gather_tokens
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Precision

_HALVES = {"fp16": InterleavedHalves(ir.DataType.FLOAT16), "bf16": InterleavedHalves(ir.DataType.BFLOAT16)}
_BY_TYPE = {"F16": _HALVES["fp16"], "BF16": _HALVES["bf16"]}
_ROUNDED = {"int8": RoundedBlocks(bits=8, zero=128), "int4": SearchedInterleaved()}


class PluggedOnnxRuntime(OnnxRuntime):
    """The ONNX Runtime target, with the CPU operators for all matrices that they can read, and for attention.

    Args:
        precision: as for ``OnnxRuntime``.
        segments: as for ``OnnxRuntime``.
        caches: the type of keys and values: "fp32" or "fp16"; "int8" for graphs with float32 caches, which
            ``make_caches_int8`` changes; "auto" for fp32.
        options: those of ``OnnxRuntime``.
    """

    storages: Mapping[str, Storage] = {**OnnxRuntime.storages, **_HALVES, **_ROUNDED}
    nearest = RoundedBlocks(bits=4, zero=8)

    routes_at_once = True
    attends_ragged = True

    def __init__(
        self,
        precision: Precision,
        segments: Segments | None = None,
        *,
        caches: Literal["auto", "fp32", "fp16", "int8"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(precision, segments, **options)
        self._cache_dtype = ir.DataType.FLOAT16 if caches == "fp16" else ir.DataType.FLOAT

    @property
    def cache_dtype(self) -> ir.DataType:
        return self._cache_dtype

    @property
    def selects_weights(self) -> bool:  # type: ignore[override]
        """Whether the layers' weights are of one form: a GGUF's blocks may differ from layer to layer."""
        return self.precision != "gguf"

    def finish(self, model: ir.Model) -> None:
        fuse(model)
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

    def gather_tokens(self, op: Any, x: ir.Value, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
        return gather_tokens(op, x, chosen)

    def rotates_in_attention(self, architecture: Architecture) -> bool:
        return super().rotates_in_attention(architecture) if architecture.sinks else rotates(architecture)

    def attention(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        if inputs.sinks is not None and self._cache_dtype != ir.DataType.FLOAT:
            raise DynexportError(
                f"kv_cache_dtype: expected auto or fp32, found {self._cache_dtype.name.lower()}, which no attention "
                "with sinks takes"
            )
        if inputs.sinks is not None:
            return super().attention(op, inputs)
        packed: ir.Value = inputs.query
        if inputs.key is not None:
            packed = op.Concat(inputs.query, inputs.key, inputs.value, axis=-1)
        padded = self._padded(op, packed, inputs.heads + 2 * inputs.kv_heads, inputs.head_dim)
        assert padded is not None
        output, key, value = attend(op, padded, inputs)
        return self._unpadded(op, output, inputs), key, value


__all__ = ["PluggedOnnxRuntime"]
