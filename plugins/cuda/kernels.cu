// All kernels as one unit: the headers of the two short floating-point types take longer to compile than the kernels.
//
// A kernel has a C name, so that it can be looked up in a cubin or embedded in an engine, and takes, in this order, all
// inputs of the operator, 32-bit sizes, all outputs.
#include "capacity_top_k.cuh"
#include "gated_scatter_add.cuh"
#include "ragged_kv_append.cuh"
#include "selected_matmul.cuh"
