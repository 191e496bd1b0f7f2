// RaggedKVAppend: one block per new entry of a row and head copies it to the cache, or drops it.
#pragma once

#include "elements.cuh"

namespace dynexport
{
namespace
{

constexpr int32_t kAppendThreads = 128;

template <typename T>
__device__ void copyEntry(T const* added, int64_t const* writeIndex, int64_t const* counts, int32_t heads,
    int32_t entries, int32_t capacity, int32_t depth, T* cache)
{
    int64_t const block = blockIdx.x;
    int64_t const rowAndHead = block / capacity;
    int64_t const row = rowAndHead / heads;
    int64_t const j = block % capacity;
    int64_t const entry = writeIndex[row] + j;
    if (j >= counts[row] || entry < 0 || entry >= entries)
    {
        return;
    }
    T* const to = cache + (rowAndHead * entries + entry) * depth;
    T const* const from = added + block * depth;
    for (int32_t i = threadIdx.x; i < depth; i += kAppendThreads)
    {
        to[i] = from[i];
    }
}

} // namespace

#define DEFINE(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(kAppendThreads) dynexport_ragged_kv_append_##NAME(void const*,             \
        void const* added, void const* writeIndex, void const* counts, int32_t heads, int32_t entries,                \
        int32_t capacity, int32_t depth, void* cache)                                                                  \
    {                                                                                                                  \
        copyEntry(static_cast<T const*>(added), static_cast<int64_t const*>(writeIndex),                              \
            static_cast<int64_t const*>(counts), heads, entries, capacity, depth, static_cast<T*>(cache));            \
    }
DYNEXPORT_FOR_EACH_ELEMENT(DEFINE)
#undef DEFINE

} // namespace dynexport
