// The operators for TensorRT. plugins/operators.py describes them for ONNX; a test compares the two.
#pragma once

#include "../cuda/launch.h"

#include <NvInferRuntime.h>
#include <array>

namespace dynexport
{

constexpr char const* kNamespace = "dynexport";
constexpr char const* kVersion = "1";

// Sizes by the letter of the dimension.
using Sizes = std::array<int32_t, 128>;

struct TensorSpec
{
    char const* name;
    // If isGeneric, the type is kFLOAT, kHALF or kBF16, the same for all such tensors of a node.
    bool isGeneric;
    nvinfer1::DataType type;
    // One letter per dimension; equal letters mean equal sizes.
    char const* dims;
};

using Launch = cudaError_t (*)(
    Element element, Sizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream);

struct OperatorSpec
{
    char const* name;
    int32_t nbInputs;
    int32_t nbOutputs;
    std::array<TensorSpec, 5> inputs;
    std::array<TensorSpec, 2> outputs;
    // The first output may share memory with the first input.
    bool isInPlace;
    Launch launch;
};

extern std::array<OperatorSpec, 4> const kOperators;

} // namespace dynexport
