// Host code: the kernels' grids and the copies before them.
#include "kernels.cu"
#include "launch.h"

namespace dynexport
{
namespace
{

// Beyond this the last step of a thread through a row would overflow.
constexpr int32_t kLongestRow = 1 << 30;

// One of a kernel's three instances; their parameters are untyped so that they have one type.
template <typename Kernel>
Kernel* pick(Element element, Kernel* float32, Kernel* float16, Kernel* bfloat16)
{
    switch (element)
    {
    case Element::kFloat16: return float16;
    case Element::kBFloat16: return bfloat16;
    default: return float32;
    }
}

cudaError_t copyUnlessSame(void* to, void const* from, Element element, int64_t count, cudaStream_t stream)
{
    if (to == from || count == 0)
    {
        return cudaSuccess;
    }
    size_t const bytes = static_cast<size_t>(count) * (element == Element::kFloat32 ? 4 : 2);
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

// CUDA refuses an empty grid, and this is the limit of a grid dimension.
bool gridFits(int64_t blocks)
{
    return blocks > 0 && blocks <= INT32_MAX;
}

cudaError_t refuseGrid(int64_t blocks)
{
    return blocks == 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

} // namespace

cudaError_t launchCapacityTopK(
    CapacityTopKSizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream)
{
    if (sizes.length > kLongestRow)
    {
        return cudaErrorInvalidValue;
    }
    if (!gridFits(sizes.rows))
    {
        return refuseGrid(sizes.rows);
    }
    dynexport_capacity_top_k<<<sizes.rows, kTopKThreads, 0, stream>>>(
        inputs[0], inputs[1], inputs[2], sizes.length, sizes.capacity, outputs[0], outputs[1]);
    return cudaPeekAtLastError();
}

cudaError_t launchGatedScatterAdd(Element element, GatedScatterAddSizes const& sizes, void const* const* inputs,
    void* const* outputs, cudaStream_t stream)
{
    int64_t const count = int64_t{sizes.rows} * sizes.length * sizes.hidden;
    cudaError_t const copied = copyUnlessSame(outputs[0], inputs[0], element, count, stream);
    int64_t const blocks = int64_t{sizes.rows} * sizes.capacity;
    if (copied != cudaSuccess || !gridFits(blocks))
    {
        return copied != cudaSuccess ? copied : refuseGrid(blocks);
    }
    auto* const kernel = pick(element, dynexport_gated_scatter_add_float32, dynexport_gated_scatter_add_float16,
        dynexport_gated_scatter_add_bfloat16);
    kernel<<<static_cast<uint32_t>(blocks), kScatterThreads, 0, stream>>>(inputs[0], inputs[1], inputs[2], inputs[3],
        inputs[4], sizes.length, sizes.hidden, sizes.capacity, outputs[0]);
    return cudaPeekAtLastError();
}

cudaError_t launchRaggedKVAppend(Element element, RaggedKVAppendSizes const& sizes, void const* const* inputs,
    void* const* outputs, cudaStream_t stream)
{
    int64_t const rowsAndHeads = int64_t{sizes.rows} * sizes.heads;
    int64_t const count = rowsAndHeads * sizes.entries * sizes.depth;
    cudaError_t const copied = copyUnlessSame(outputs[0], inputs[0], element, count, stream);
    int64_t const blocks = rowsAndHeads * sizes.added;
    if (copied != cudaSuccess || !gridFits(blocks))
    {
        return copied != cudaSuccess ? copied : refuseGrid(blocks);
    }
    auto* const kernel = pick(element, dynexport_ragged_kv_append_float32, dynexport_ragged_kv_append_float16,
        dynexport_ragged_kv_append_bfloat16);
    kernel<<<static_cast<uint32_t>(blocks), kAppendThreads, 0, stream>>>(inputs[0], inputs[1], inputs[2], inputs[3],
        sizes.heads, sizes.entries, sizes.added, sizes.depth, outputs[0]);
    return cudaPeekAtLastError();
}

cudaError_t launchSelectedMatMul(Element element, SelectedMatMulSizes const& sizes, void const* const* inputs,
    void* const* outputs, cudaStream_t stream)
{
    int64_t const blocks = int64_t{sizes.tokens} * ((sizes.outputs + kRowsOfBlock - 1) / kRowsOfBlock);
    if (!gridFits(blocks))
    {
        return refuseGrid(blocks);
    }
    auto* const kernel = pick(element, dynexport_selected_matmul_float32, dynexport_selected_matmul_float16,
        dynexport_selected_matmul_bfloat16);
    kernel<<<static_cast<uint32_t>(blocks), kMatMulThreads, 0, stream>>>(
        inputs[0], inputs[1], inputs[2], sizes.layers, sizes.outputs, sizes.inputs, outputs[0]);
    return cudaPeekAtLastError();
}

} // namespace dynexport
