#include "plugin.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>

namespace dynexport
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kGood = 0;
constexpr int32_t kBad = 1;

std::atomic<nvinfer1::ILogger*> gLogger{nullptr};
std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

bool isFloat(DataType type)
{
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

Element elementOf(DataType type)
{
    return type == DataType::kHALF ? Element::kFloat16
        : type == DataType::kBF16  ? Element::kBFloat16
                                   : Element::kFloat32;
}

// The first generic input, or -1.
int32_t genericInput(OperatorSpec const& spec)
{
    for (int32_t i = 0; i < spec.nbInputs; ++i)
    {
        if (spec.inputs[i].isGeneric)
        {
            return i;
        }
    }
    return -1;
}

int32_t rankOf(TensorSpec const& tensor)
{
    return static_cast<int32_t>(std::strlen(tensor.dims));
}

nvinfer1::IDimensionExpr const* dimOf(OperatorSpec const& spec, char letter, DimsExprs const* inputs)
{
    for (int32_t i = 0; i < spec.nbInputs; ++i)
    {
        char const* const found = std::strchr(spec.inputs[i].dims, letter);
        if (found != nullptr)
        {
            return inputs[i].d[found - spec.inputs[i].dims];
        }
    }
    return nullptr;
}

} // namespace

void setLogger(nvinfer1::ILogger* logger) noexcept
{
    gLogger = logger;
}

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder = finder;
}

void report(OperatorSpec const& spec, char const* message) noexcept
{
    std::array<char, 512> line{};
    std::snprintf(line.data(), line.size(), "%s: %s", spec.name, message);
    nvinfer1::ILoggerFinder* const finder = gFinder;
    nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : gLogger.load();
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.data());
    }
    else
    {
        std::fprintf(stderr, "%s\n", line.data());
    }
}

Plugin::Plugin(OperatorSpec const& spec) noexcept
    : mSpec(spec)
{
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept
{
    return new (std::nothrow) Plugin(mSpec);
}

char const* Plugin::getPluginName() const noexcept
{
    return mSpec.name;
}

char const* Plugin::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* Plugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t Plugin::getNbOutputs() const noexcept
{
    return mSpec.nbOutputs;
}

bool Plugin::hasCounts(int32_t nbInputs, int32_t nbOutputs) const noexcept
{
    if (nbInputs == mSpec.nbInputs && nbOutputs == mSpec.nbOutputs)
    {
        return true;
    }
    std::array<char, 128> message{};
    std::snprintf(message.data(), message.size(), "expected %d inputs and %d outputs, found %d and %d", mSpec.nbInputs,
        mSpec.nbOutputs, nbInputs, nbOutputs);
    report(mSpec, message.data());
    return false;
}

int32_t Plugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!hasCounts(nbInputs, nbOutputs))
    {
        return kBad;
    }
    int32_t const generic = genericInput(mSpec);
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputTypes[i] = mSpec.outputs[i].isGeneric ? inputTypes[generic] : mSpec.outputs[i].type;
    }
    return kGood;
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const* /*shapeInputs*/,
    int32_t /*nbShapeInputs*/, DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (!hasCounts(nbInputs, nbOutputs))
    {
        return kBad;
    }
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        if (inputs[i].nbDims != rankOf(mSpec.inputs[i]))
        {
            std::array<char, 128> message{};
            std::snprintf(message.data(), message.size(), "input %s: expected dimensions %s, found %d of them",
                mSpec.inputs[i].name, mSpec.inputs[i].dims, inputs[i].nbDims);
            report(mSpec, message.data());
            return kBad;
        }
    }
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputs[i].nbDims = rankOf(mSpec.outputs[i]);
        for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis)
        {
            outputs[i].d[axis] = dimOf(mSpec, mSpec.outputs[i].dims[axis], inputs);
        }
    }
    return kGood;
}

bool Plugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (!hasCounts(nbInputs, nbOutputs) || pos < 0 || pos >= nbInputs + nbOutputs)
    {
        return false;
    }
    TensorSpec const& tensor = pos < nbInputs ? mSpec.inputs[pos] : mSpec.outputs[pos - nbInputs];
    PluginTensorDesc const& desc = inOut[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    if (!tensor.isGeneric)
    {
        return desc.type == tensor.type;
    }
    // The first generic input comes before all other generic tensors.
    int32_t const generic = genericInput(mSpec);
    return pos == generic ? isFloat(desc.type) : desc.type == inOut[generic].desc.type;
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* /*in*/, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    return hasCounts(nbInputs, nbOutputs) ? kGood : kBad;
}

int32_t Plugin::getAliasedInput(int32_t outputIndex) noexcept
{
    return mSpec.isInPlace && outputIndex == 0 ? 0 : -1;
}

char const* Plugin::getTimingCacheID() noexcept
{
    return kVersion;
}

bool Plugin::readSizes(PluginTensorDesc const* in, Sizes& sizes) const noexcept
{
    sizes.fill(-1);
    for (int32_t i = 0; i < mSpec.nbInputs; ++i)
    {
        TensorSpec const& tensor = mSpec.inputs[i];
        for (int32_t axis = 0; axis < rankOf(tensor); ++axis)
        {
            int64_t const size = in[i].dims.d[axis];
            int32_t& known = sizes[static_cast<size_t>(tensor.dims[axis])];
            bool const fits = size >= 0 && size <= INT32_MAX;
            if (!fits || (known != -1 && known != size))
            {
                std::array<char, 160> message{};
                std::snprintf(message.data(), message.size(),
                    "input %s: expected %d for dimension %c, found %lld; -1 is any size below 2^31", tensor.name, known,
                    tensor.dims[axis], static_cast<long long>(size));
                report(mSpec, message.data());
                return false;
            }
            known = static_cast<int32_t>(size);
        }
    }
    return true;
}

int32_t Plugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    Sizes sizes{};
    return hasCounts(nbInputs, nbOutputs) && readSizes(in, sizes) ? kGood : kBad;
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* /*workspace*/, cudaStream_t stream) noexcept
{
    Sizes sizes{};
    if (!readSizes(inputDesc, sizes))
    {
        return kBad;
    }
    int32_t const generic = genericInput(mSpec);
    Element const element = generic < 0 ? Element::kFloat32 : elementOf(inputDesc[generic].type);
    cudaError_t const result = mSpec.launch(element, sizes, inputs, outputs, stream);
    if (result != cudaSuccess)
    {
        report(mSpec, cudaGetErrorString(result));
        return kBad;
    }
    return kGood;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept
{
    return &mFields;
}

Creator::Creator(OperatorSpec const& spec) noexcept
    : mSpec(spec)
{
}

nvinfer1::IPluginV3* Creator::createPlugin(
    char const* /*name*/, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    if (fields != nullptr && fields->nbFields != 0)
    {
        std::array<char, 160> message{};
        std::snprintf(message.data(), message.size(), "expected no attributes, found %d, the first named %s",
            fields->nbFields, fields->fields[0].name);
        report(mSpec, message.data());
        return nullptr;
    }
    return new (std::nothrow) Plugin(mSpec);
}

nvinfer1::PluginFieldCollection const* Creator::getFieldNames() noexcept
{
    return &mFields;
}

char const* Creator::getPluginName() const noexcept
{
    return mSpec.name;
}

char const* Creator::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* Creator::getPluginNamespace() const noexcept
{
    return kNamespace;
}

} // namespace dynexport
