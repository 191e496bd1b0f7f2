// The operators as TensorRT sees them. plugins/operators.py says the same to ONNX; a test compares the two.
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
    // kFLOAT, kHALF and kBF16 may all stand where isGeneric, the same for all such tensors of a node.
    bool isGeneric;
    nvinfer1::DataType type;
    // One letter a dimension; where a letter comes again, the sizes are equal.
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
    // The first output may be the first input's memory.
    bool isInPlace;
    Launch launch;
};

extern std::array<OperatorSpec, 4> const kOperators;

} // namespace dynexport
