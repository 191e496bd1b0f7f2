// GatedScatterAdd: one block per slot adds an update to the output, which already holds the residual. The positions of
// a batch row differ, so no element is added to twice and no atomics are needed.
#pragma once

#include "elements.cuh"

namespace dynexport
{
namespace
{

constexpr int32_t kScatterThreads = 256;

template <typename T>
__device__ void addRow(T const* update, T const* gate, int64_t const* positions, int32_t const* valid, int32_t length,
    int32_t hidden, int32_t capacity, T* output)
{
    int64_t const slot = blockIdx.x;
    int64_t const position = positions[slot];
    if (valid[slot] == 0 || position < 0 || position >= length)
    {
        return;
    }
    T* const to = output + (slot / capacity * length + position) * hidden;
    T const* const from = update + slot * hidden;
    float const factor = toFloat(gate[slot]);
    for (int32_t i = threadIdx.x; i < hidden; i += kScatterThreads)
    {
        to[i] = fromFloat<T>(toFloat(to[i]) + factor * toFloat(from[i]));
    }
}

} // namespace

#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(kScatterThreads) dynexport_gated_scatter_add_##NAME(void const*,            \
        void const* update, void const* gate, void const* positions, void const* valid, int32_t length,               \
        int32_t hidden, int32_t capacity, void* output)                                                                \
    {                                                                                                                  \
        addRow(static_cast<T const*>(update), static_cast<T const*>(gate), static_cast<int64_t const*>(positions),    \
            static_cast<int32_t const*>(valid), length, hidden, capacity, static_cast<T*>(output));                   \
    }
DYNEXPORT_FOR_EACH_ELEMENT(DEFINE)
#undef DEFINE

} // namespace dynexport
