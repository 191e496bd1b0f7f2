// SelectedMatMul: one warp per product of a weight row and a token, accumulated in float32. A token reads the J x K
// weights of its own layer and no others; tokens of one layer find them in the cache.
#pragma once

#include "elements.cuh"
#include "warp.cuh"

namespace dynexport
{
namespace
{

constexpr int32_t kRowsOfBlock = 8;
constexpr int32_t kMatMulThreads = kWarp * kRowsOfBlock;

template <typename T>
__device__ void multiply(
    T const* x, T const* weight, int64_t const* index, int32_t layers, int32_t outputs, int32_t inputs, T* y)
{
    int32_t const tiles = (outputs + kRowsOfBlock - 1) / kRowsOfBlock;
    int64_t const token = blockIdx.x / tiles;
    int32_t const row = static_cast<int32_t>(blockIdx.x % tiles) * kRowsOfBlock + threadIdx.x / kWarp;
    if (row >= outputs)
    {
        return;
    }
    int32_t const lane = threadIdx.x % kWarp;
    int64_t const layer = index[token];
    float sum = 0.0F;
    // -1 marks a token without a layer; other invalid indices give zeros too, and never read outside of the weights.
    if (layer >= 0 && layer < layers)
    {
        T const* const ofRow = weight + (layer * outputs + row) * inputs;
        T const* const ofToken = x + token * inputs;
        for (int32_t i = lane; i < inputs; i += kWarp)
        {
            sum += toFloat(ofRow[i]) * toFloat(ofToken[i]);
        }
    }
    for (int32_t step = kWarp / 2; step > 0; step /= 2)
    {
        sum += __shfl_down_sync(kAllLanes, sum, step);
    }
    if (lane == 0)
    {
        y[token * outputs + row] = fromFloat<T>(sum);
    }
}

} // namespace

#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(kMatMulThreads) dynexport_selected_matmul_##NAME(void const* x,            \
        void const* weight, void const* index, int32_t layers, int32_t outputs, int32_t inputs, void* y)              \
    {                                                                                                                  \
        multiply(static_cast<T const*>(x), static_cast<T const*>(weight), static_cast<int64_t const*>(index), layers, \
            outputs, inputs, static_cast<T*>(y));                                                                      \
    }
DYNEXPORT_FOR_EACH_ELEMENT(DEFINE)
#undef DEFINE

} // namespace dynexport
