// The table of operators, and the launch of each one for given sizes.
#include "operators.h"

namespace dynexport
{
namespace
{

using nvinfer1::DataType;

constexpr TensorSpec generic(char const* name, char const* dims)
{
    return {name, true, DataType::kFLOAT, dims};
}

constexpr TensorSpec typed(char const* name, DataType type, char const* dims)
{
    return {name, false, type, dims};
}

cudaError_t capacityTopK(
    Element /*element*/, Sizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream)
{
    if (sizes['K'] > sizes['S'])
    {
        return cudaErrorInvalidValue;
    }
    return launchCapacityTopK({sizes['B'], sizes['S'], sizes['K']}, inputs, outputs, stream);
}

cudaError_t gatedScatterAdd(
    Element element, Sizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream)
{
    GatedScatterAddSizes const named{sizes['B'], sizes['S'], sizes['H'], sizes['K']};
    return launchGatedScatterAdd(element, named, inputs, outputs, stream);
}

cudaError_t raggedKVAppend(
    Element element, Sizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream)
{
    RaggedKVAppendSizes const named{sizes['B'], sizes['h'], sizes['M'], sizes['K'], sizes['D']};
    return launchRaggedKVAppend(element, named, inputs, outputs, stream);
}

cudaError_t selectedMatMul(
    Element element, Sizes const& sizes, void const* const* inputs, void* const* outputs, cudaStream_t stream)
{
    SelectedMatMulSizes const named{sizes['N'], sizes['L'], sizes['J'], sizes['K']};
    return launchSelectedMatMul(element, named, inputs, outputs, stream);
}

} // namespace

std::array<OperatorSpec, 4> const kOperators{{
    {"CapacityTopK", 3, 2,
        {{typed("scores", DataType::kFLOAT, "BS"), typed("counts", DataType::kINT64, "B"),
            typed("slots", DataType::kINT64, "K")}},
        {{typed("positions", DataType::kINT64, "BK"), typed("valid", DataType::kINT32, "BK")}}, false, capacityTopK},
    {"GatedScatterAdd", 5, 1,
        {{generic("residual", "BSH"), generic("update", "BKH"), generic("gate", "BK"),
            typed("positions", DataType::kINT64, "BK"), typed("valid", DataType::kINT32, "BK")}},
        {{generic("output", "BSH")}}, true, gatedScatterAdd},
    {"RaggedKVAppend", 4, 1,
        {{generic("cache", "BhMD"), generic("new", "BhKD"), typed("write_index", DataType::kINT64, "B"),
            typed("count", DataType::kINT64, "B")}},
        {{generic("output", "BhMD")}}, true, raggedKVAppend},
    {"SelectedMatMul", 3, 1,
        {{generic("x", "NK"), generic("weight", "LJK"), typed("index", DataType::kINT64, "N")}},
        {{generic("y", "NJ")}}, false, selectedMatMul},
}};

} // namespace dynexport
