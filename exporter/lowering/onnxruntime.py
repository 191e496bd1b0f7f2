"""Lowering for ONNX Runtime: fused kernels, block-quantised products, and caches that GroupQueryAttention updates.

Why these operators: docs/architecture.md, "The ONNX Runtime lowering".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Activation, Architecture, Experts, Rotary
from dynexport.exporter.lowering.block_products import ACCURACY_LEVEL, MICROSOFT, look_up, multiply
from dynexport.exporter.lowering.blocks import Blocked, Rows, Segment, Unnamed
from dynexport.exporter.lowering.experts import ExpertBlocks, ExpertWeights, by_kernel
from dynexport.exporter.lowering.searched import SearchedBlocks
from dynexport.exporter.lowering.storage import BlockQuantized, Plain, Split, Storage, StoredWeight
from dynexport.exporter.lowering.target import AttentionInputs, Target
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import HEAD_DIM_MULTIPLE, Precision, TargetName

OPSET = 24
_TABLE_MULTIPLE = 8
_ROTATED_HEAD_DIM_MULTIPLE = 16
_LARGEST_TABLES = 256 << 20
_STORAGES: dict[str, Storage] = {
    "fp32": Plain(),
    "fp16": Plain(ir.DataType.FLOAT16),
    "int8": BlockQuantized(8),
    "int4": SearchedBlocks(),
    "gguf": Unnamed(),
}
# Types without blocks whose values these storages keep; matrices of all other types are rounded to int8.
_OTHER_TYPES: dict[str, Storage] = {
    "F32": Plain(),
    "BF16": Plain(),
    "F16": Plain(ir.DataType.FLOAT16),
}
_ROUNDED = BlockQuantized(8)
Segments = Callable[[str, tuple[int, ...]], Sequence[Segment]]
# Name of a weight -> its rows from the first on: how many, and whether they stay in 8 bits.
Kept = Mapping[str, Sequence[tuple[int, bool]]]


class OnnxRuntime(Target):
    """The ONNX Runtime target: weights in ``precision``; norms, rotary, softmax and logits in float32.

    Attributes:
        storages: the storage of weights by precision.

    Args:
        precision: the stored type of projections and embeddings.
        segments: for precision gguf, how the checkpoint stores the rows of a matrix of the graph, by name and shape.
        zero_points: for int4, whether blocks have zero points that are searched, or symmetric integers.
        head_bits: for int4, the bits of the head and of embedding tables, 8 or 4.
        kept: for int4, the weights with rows that stay in 8 bits.
    """

    name: TargetName = "onnxruntime"
    title = "ONNX Runtime"
    opset_imports: Mapping[str, int] = {"": OPSET, MICROSOFT: 1}
    storages: Mapping[str, Storage] = _STORAGES
    nearest: Storage = BlockQuantized(4)

    def __init__(
        self,
        precision: Precision,
        segments: Segments | None = None,
        *,
        zero_points: bool = True,
        head_bits: int = 8,
        kept: Kept | None = None,
    ) -> None:
        if precision not in self.storages:
            raise DynexportError(
                f"precision: expected auto, fp32, fp16, int8 or int4 for ONNX Runtime, found {precision}, which its "
                "CPU provider has no kernels for; choose fp16, use dynexport's operators (--plugins), or --target "
                "tensorrt"
            )
        self.precision, self.storage, self._segments = precision, self.storages[precision], segments
        self._kept = {} if kept is None else kept
        if precision == "int4" and not zero_points:
            self.storage = self.nearest
        self._table_storage = self.storages["int8"] if precision == "int4" and head_bits == 8 else self.storage

    def bits_read(self, dtype: ir.DataType) -> int:
        """Return the bits read per element; a session widens float16 weights to float32 when it loads."""
        return 32 if dtype == ir.DataType.FLOAT16 else dtype.bitwidth

    def weight_storage(self, shape: Sequence[int]) -> Storage:
        return self.fitting(self.storage, shape)

    def embedding_storage(self, shape: Sequence[int], *, tied: bool) -> Storage:
        # GatherBlockQuantized accepts whole blocks only.
        storage = self.fitting(self._table_storage, shape)
        if isinstance(storage, BlockQuantized) and shape[1] % storage.block_size:
            return Plain()
        return storage

    def head_storage(self, shape: Sequence[int]) -> Storage:
        return self.fitting(self._table_storage, shape)

    def expert_storage(self, columns: Sequence[int]) -> Storage:
        """Return blocks of rows in int8 and int4; else float32, as there is no product of experts in 16 bits.

        Those of a GGUF's types are stored in int8, which has the values of types without minima.
        """
        stored = {"int8": "int8", "int4": "int4", "gguf": "int8"}
        single = OnnxRuntime.storages[stored[self.precision]] if self.precision in stored else Plain()
        if not isinstance(single, BlockQuantized) or any(length % single.block_size for length in columns):
            return Plain()
        return ExpertBlocks(single)

    def fitting(self, storage: Storage, shape: Sequence[int]) -> Storage:
        """Return the storage, or what takes its place if it does not fit a shape."""
        return storage

    def named_storage(self, name: str, weight: StoredWeight) -> Storage:
        if name in self._kept:
            found = [(rows, self.storages["int8"] if kept else self.storage) for rows, kept in self._kept[name]]
            parts = tuple((rows, self.fitting(storage, (rows, weight.shape[1]))) for rows, storage in found)
            return parts[0][1] if len(parts) == 1 else Split(parts)
        if not isinstance(weight.storage, Unnamed):
            return weight.storage
        assert self._segments is not None
        segments = self._segments(name, weight.shape)
        storages = [self.storage_of(segment, weight.shape[1]) for segment in segments]
        if len(storages) == 1:
            return storages[0]
        return Rows(tuple((segment.rows, storage) for segment, storage in zip(segments, storages, strict=True)))

    def storage_of(self, segment: Segment, columns: int) -> Storage:
        """Return the storage that keeps a checkpoint's rows as they are, or rounds rows of an unknown type."""
        if segment.form is not None:
            return Blocked(segment.form)
        known = _OTHER_TYPES.get(segment.kind)
        whole = columns % _ROUNDED.block_size == 0  # as GatherBlockQuantized requires
        return known or (_ROUNDED if whole else Plain())

    def matmul(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        rows, columns = weight.shape
        if isinstance(weight.storage, Split):
            products = [self.matmul(op, x, part) for part in weight.storage.split(weight)]
            return self._like(op.Concat(*products, axis=-1), x, rows)
        if isinstance(weight.storage, Blocked):
            return self._like(multiply(op, x, weight.parts, rows, columns, weight.storage), x, rows)
        if isinstance(weight.storage, BlockQuantized):
            y = op.MatMulNBits(
                x,
                weight.parts["_quantized"],
                weight.parts["_scales"],
                *_zero_points(weight),
                _domain=MICROSOFT,
                N=rows,
                K=columns,
                bits=weight.storage.bits,
                block_size=weight.storage.block_size,
                accuracy_level=ACCURACY_LEVEL,
            )
        else:
            y = op.FusedMatMul(x, _widened(op, weight.parts[""]), _domain=MICROSOFT, transB=1)
        return self._like(y, x, rows)

    def gather_rows(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        if isinstance(weight.storage, Blocked):
            rows, columns = weight.shape
            return _float(look_up(op, indices, weight.parts, (rows, columns), weight.storage))
        if isinstance(weight.storage, BlockQuantized):
            rows, columns = weight.shape
            table = op.Reshape(weight.parts["_quantized"], [rows, columns * weight.storage.bits // 8])
            y = op.GatherBlockQuantized(
                table,
                indices,
                weight.parts["_scales"],
                *_zero_points(weight),
                _domain=MICROSOFT,
                bits=weight.storage.bits,
                block_size=weight.storage.block_size,
                gather_axis=0,
                quantize_axis=1,
            )
            return _float(y)
        return _widened(op, op.Gather(weight.parts[""], indices))

    def norm(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        if bias is None:
            return _float(op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon))
        return _float(op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon))

    def add_norm(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        epsilon: float,
    ) -> tuple[ir.Value, ir.Value]:
        kind = "SkipSimplifiedLayerNormalization" if bias is None else "SkipLayerNormalization"
        inputs = [residual, x, weight] + ([] if bias is None else [bias])
        outputs = getattr(op, kind)(*inputs, _domain=MICROSOFT, _outputs=4, epsilon=epsilon)
        for unused in outputs[1:3]:
            unused.name = ""
        return self._like(outputs[0], x), self._like(outputs[3], x)

    def activate(self, op: Any, x: ir.Value, activation: Activation) -> ir.Value:
        if activation == "silu":
            return self._like(op.QuickGelu(x, _domain=MICROSOFT, alpha=1.0), x)
        if activation == "relu":
            return _float(op.Relu(x))
        if activation == "relu2":
            positive = _float(op.Relu(x))
            return op.Mul(positive, positive)
        return _float(op.Gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none"))

    def experts(self, op: Any, x: ir.Value, scores: ir.Value, weights: ExpertWeights, experts: Experts) -> ir.Value:
        return self._like(by_kernel(op, x, scores, weights, experts), x)

    def rotates_in_attention(self, architecture: Architecture) -> bool:
        positions = architecture.positions
        if not isinstance(positions, Rotary):
            return False
        # The kernel's own conditions, and a limit for the size of the tables.
        fits = positions.dim // 2 % _TABLE_MULTIPLE == 0
        fits = fits and self.cache_head_dim(architecture.head_dim) % _ROTATED_HEAD_DIM_MULTIPLE == 0
        return fits and architecture.max_length * positions.dim * 4 <= _LARGEST_TABLES

    def cache_head_dim(self, head_dim: int) -> int:
        """Return ``head_dim`` rounded up to a multiple of 8, as GroupQueryAttention requires; the rest is zeros."""
        return -(-head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE

    def attention(self, op: Any, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Append and attend; zero padding does not change the scores, and the output's padding is removed."""
        extra = [*(inputs.rotary or (None, None, None)), inputs.bias, inputs.sinks]
        while extra and extra[-1] is None:
            extra.pop()
        apart = inputs.key is not None
        query = self._padded(op, inputs.query, inputs.heads + (0 if apart else 2 * inputs.kv_heads), inputs.head_dim)
        key, value = (self._padded(op, part, inputs.kv_heads, inputs.head_dim) for part in (inputs.key, inputs.value))
        output, present_key, present_value = op.GroupQueryAttention(
            query,
            key,
            value,
            inputs.past_key,
            inputs.past_value,
            inputs.last_index,
            inputs.total_length,
            *extra,
            _domain=MICROSOFT,
            _outputs=3,
            do_rotary=int(inputs.rotary is not None),
            num_heads=inputs.heads,
            kv_num_heads=inputs.kv_heads,
            scale=inputs.scale,
            softcap=inputs.softcap or 0.0,
        )
        return self._unpadded(op, _float(output), inputs), _float(present_key), _float(present_value)

    def append(self, op: Any, past: ir.Value, new: ir.Value, cache_length: ir.Value) -> ir.Value:
        assert past.shape is not None
        _, heads, _, channels = past.shape
        by_head = op.Transpose(op.Reshape(new, [0, 0, heads, channels]), perm=[0, 2, 1, 3])
        return _float(op.TensorScatter(past, by_head, cache_length, axis=2))

    def _like(self, value: ir.Value, x: ir.Value, features: int | None = None) -> ir.Value:
        """Declare the type of a result, and with blocks its shape, as sums of blocks depend on the number of axes."""
        if self._segments is not None and value.shape is None and x.shape is not None:
            value.shape = ir.Shape([*x.shape[:-1], x.shape[-1] if features is None else features])
        return _float(value)

    def _padded(self, op: Any, x: ir.Value | None, heads: int, head_dim: int) -> ir.Value | None:
        """Pad every head with zeros: [B, S, heads * head_dim] -> [B, S, heads * cache_head_dim]."""
        channels = self.cache_head_dim(head_dim)
        if x is None or channels == head_dim:
            return x
        by_head = op.Pad(op.Reshape(x, [0, 0, heads, head_dim]), [0, channels - head_dim], None, [-1])
        return _float(op.Reshape(by_head, [0, 0, heads * channels]))

    def _unpadded(self, op: Any, x: ir.Value, inputs: AttentionInputs) -> ir.Value:
        """Remove the padding of every head: [B, S, heads * cache_head_dim] -> [B, S, heads * head_dim]."""
        heads, head_dim, channels = inputs.heads, inputs.head_dim, self.cache_head_dim(inputs.head_dim)
        if channels == head_dim:
            return x
        by_head = op.Reshape(x, [0, 0, heads, channels])
        kept, _ = op.Split(by_head, [head_dim, channels - head_dim], axis=-1, _outputs=2)
        return _float(op.Reshape(kept, [0, 0, heads * head_dim]))


def _zero_points(weight: StoredWeight) -> list[ir.Value]:
    return [weight.parts["_zero_points"]] if "_zero_points" in weight.parts else []


def _widened(op: Any, value: ir.Value) -> ir.Value:
    """Cast to float32; ONNX Runtime folds the cast of a stored float16 weight when it loads the session."""
    if value.dtype == ir.DataType.FLOAT16:
        return _float(op.Cast(value, to=ir.DataType.FLOAT))
    return _float(value)


def _float(value: ir.Value) -> ir.Value:
    """Declare the type of an operator's result that shape inference does not know."""
    if value.type is None:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return value
