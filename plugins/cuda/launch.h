// The kernels as the C++ plugins call them. Pointers are device memory, row-major and dense; calls do not wait.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace dynexport
{

enum class Element : int32_t
{
    kFloat32,
    kFloat16,
    kBFloat16,
};

struct CapacityTopKSizes
{
    int32_t rows;
    int32_t length;
    int32_t capacity;
};

struct GatedScatterAddSizes
{
    int32_t rows;
    int32_t length;
    int32_t hidden;
    int32_t capacity;
};

struct RaggedKVAppendSizes
{
    int32_t rows;
    int32_t heads;
    int32_t entries;
    int32_t added;
    int32_t depth;
};

struct SelectedMatMulSizes
{
    int32_t tokens;
    int32_t layers;
    int32_t outputs;
    int32_t inputs;
};

// inputs and outputs as the operator has them. Where `output` of the second and third is not their first input's memory,
// that input is copied there first.
cudaError_t launchCapacityTopK(
    CapacityTopKSizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream);
cudaError_t launchGatedScatterAdd(Element element, GatedScatterAddSizes const& sizes, void const* const* inputs,
    void* const* outputs, cudaStream_t stream);
cudaError_t launchRaggedKVAppend(Element element, RaggedKVAppendSizes const& sizes, void const* const* inputs,
    void* const* outputs, cudaStream_t stream);
cudaError_t launchSelectedMatMul(Element element, SelectedMatMulSizes const& sizes, void const* const* inputs,
    void* const* outputs, cudaStream_t stream);

} // namespace dynexport
