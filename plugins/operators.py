"""The operators: each exists because a built-in one fails or does more than it has to (docs/plugins.md has figures)."""

from __future__ import annotations

from onnx_ir import DataType

from dynexport.plugins import bodies
from dynexport.plugins.schema import Operator, T, Tensor

CAPACITY_TOP_K = Operator(
    "CapacityTopK",
    "The counts[b] largest scores of every row b, at most K, lower position first on ties. NaN and minus infinity "
    "never win. TensorRT's TopK refuses a K above 3,840.",
    inputs=(
        Tensor("scores", DataType.FLOAT, "BS", "what is compared"),
        Tensor("counts", DataType.INT64, "B", "how many are wanted"),
        Tensor("slots", DataType.INT64, "K", "0, 1, .. K-1: its length is the capacity, K <= S"),
    ),
    outputs=(
        Tensor("positions", DataType.INT64, "BK", "the chosen, ascending; then others, so that all of a row differ"),
        Tensor("valid", DataType.INT32, "BK", "1 for the chosen, which come first, else 0"),
    ),
    body=bodies.capacity_top_k,
)

GATED_SCATTER_ADD = Operator(
    "GatedScatterAdd",
    "residual[b, positions[b, k]] + gate[b, k] * update[b, k] for every valid slot, residual elsewhere. TensorRT's "
    "ScatterElements and ScatterND know no addition.",
    inputs=(
        Tensor("residual", T, "BSH", "what is added to"),
        Tensor("update", T, "BKH", "what is added; any value, NaN too, where not valid"),
        Tensor("gate", T, "BK", "its factor"),
        Tensor("positions", DataType.INT64, "BK", "0 <= position < S, all of a row different, those not valid too"),
        Tensor("valid", DataType.INT32, "BK", "0 where a slot adds nothing"),
    ),
    outputs=(Tensor("output", T, "BSH", "the sum"),),
    body=bodies.gated_scatter_add,
    in_place=True,
)

RAGGED_KV_APPEND = Operator(
    "RaggedKVAppend",
    "The cache with new[b, :, j] at entry write_index[b] + j for every j < count[b]; the other entries stay, and what "
    "would lie outside the cache is dropped. TensorRT's TensorScatter writes all K entries of every row.",
    inputs=(
        Tensor("cache", T, "BhMD", "M entries a row and head"),
        Tensor("new", T, "BhKD", "K >= 1"),
        Tensor("write_index", DataType.INT64, "B", "entry of new[b, :, 0]"),
        Tensor("count", DataType.INT64, "B", "how many of the K are written"),
    ),
    outputs=(Tensor("output", T, "BhMD", "the cache"),),
    body=bodies.ragged_kv_append,
    in_place=True,
)

SELECTED_MATMUL = Operator(
    "SelectedMatMul",
    "y[n] = weight[index[n]] x[n], or zeros where index[n] is -1, for which no weight is read. The standard form "
    "copies a J x K matrix for every token, or multiplies by all L.",
    inputs=(
        Tensor("x", T, "NK", "tokens"),
        Tensor("weight", T, "LJK", "a matrix a layer"),
        Tensor("index", DataType.INT64, "N", "the layer of every token, 0 <= index < L, or -1 for none"),
    ),
    outputs=(Tensor("y", T, "NJ", "products, accumulated in float32"),),
    body=bodies.selected_matmul,
)

OPERATORS = (CAPACITY_TOP_K, GATED_SCATTER_ADD, RAGGED_KV_APPEND, SELECTED_MATMUL)

__all__ = ["CAPACITY_TOP_K", "GATED_SCATTER_ADD", "OPERATORS", "RAGGED_KV_APPEND", "SELECTED_MATMUL"]
