"""The custom operators; for each, the standard operators fail or do needless work (figures in docs/plugins.md)."""

from __future__ import annotations

from onnx_ir import DataType

from dynexport.plugins import bodies
from dynexport.plugins.schema import Operator, T, Tensor

CAPACITY_TOP_K = Operator(
    "CapacityTopK",
    "The positions of the counts[b] largest scores of each row b, at most K; ties go to the lower position. NaN and "
    "minus infinity are never chosen. TensorRT's TopK refuses a K above 3,840.",
    inputs=(
        Tensor("scores", DataType.FLOAT, "BS", "the scores"),
        Tensor("counts", DataType.INT64, "B", "number of positions to choose"),
        Tensor("slots", DataType.INT64, "K", "0, 1, .. K-1: its length is the capacity, K <= S"),
    ),
    outputs=(
        Tensor("positions", DataType.INT64, "BK", "the chosen ones, ascending; then others; all of a row differ"),
        Tensor("valid", DataType.INT32, "BK", "1 for chosen positions, which come first, else 0"),
    ),
    body=bodies.capacity_top_k,
)

GATED_SCATTER_ADD = Operator(
    "GatedScatterAdd",
    "residual[b, positions[b, k]] + gate[b, k] * update[b, k] for every valid slot, residual elsewhere. TensorRT's "
    "ScatterElements and ScatterND do not support addition.",
    inputs=(
        Tensor("residual", T, "BSH", "the tensor that is added to"),
        Tensor("update", T, "BKH", "the values to add; ignored, even if NaN, for slots that are not valid"),
        Tensor("gate", T, "BK", "factor of each slot's update"),
        Tensor("positions", DataType.INT64, "BK", "0 <= position < S; all of a row differ, valid or not"),
        Tensor("valid", DataType.INT32, "BK", "0 for slots that add nothing"),
    ),
    outputs=(Tensor("output", T, "BSH", "the sum"),),
    body=bodies.gated_scatter_add,
    in_place=True,
)

RAGGED_KV_APPEND = Operator(
    "RaggedKVAppend",
    "The cache with new[b, :, j] at entry write_index[b] + j for every j < count[b]; other entries are unchanged, and "
    "entries outside of the cache are dropped. TensorRT's TensorScatter writes all K entries of every row.",
    inputs=(
        Tensor("cache", T, "BhMD", "M entries per row and head"),
        Tensor("new", T, "BhKD", "the new entries, K >= 1"),
        Tensor("write_index", DataType.INT64, "B", "the entry that new[b, :, 0] is written to"),
        Tensor("count", DataType.INT64, "B", "number of new entries to write"),
    ),
    outputs=(Tensor("output", T, "BhMD", "the cache"),),
    body=bodies.ragged_kv_append,
    in_place=True,
)

SELECTED_MATMUL = Operator(
    "SelectedMatMul",
    "y[n] = weight[index[n]] x[n], or zeros if index[n] is -1, for which no weight is read. With standard operators, "
    "a J x K matrix is copied for every token, or each token is multiplied by all L matrices.",
    inputs=(
        Tensor("x", T, "NK", "one vector per token"),
        Tensor("weight", T, "LJK", "one matrix per layer"),
        Tensor("index", DataType.INT64, "N", "the layer of each token, 0 <= index < L, or -1 for none"),
    ),
    outputs=(Tensor("y", T, "NJ", "products, accumulated in float32"),),
    body=bodies.selected_matmul,
)

OPERATORS = (CAPACITY_TOP_K, GATED_SCATTER_ADD, RAGGED_KV_APPEND, SELECTED_MATMUL)

__all__ = ["CAPACITY_TOP_K", "GATED_SCATTER_ADD", "OPERATORS", "RAGGED_KV_APPEND", "SELECTED_MATMUL"]
