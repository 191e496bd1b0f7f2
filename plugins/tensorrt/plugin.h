// One plugin class for all operators: what differs between them is in their OperatorSpec.
#pragma once

#include "operators.h"

#include <NvInferRuntime.h>

namespace dynexport
{

// The logger for errors; stderr until TensorRT sets one.
void report(OperatorSpec const& spec, char const* message) noexcept;
void setLogger(nvinfer1::ILogger* logger) noexcept;
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// There is nothing to configure or serialize: the operators have no attributes and no weights.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit Plugin(OperatorSpec const& spec) noexcept;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;
    char const* getTimingCacheID() noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    bool hasCounts(int32_t nbInputs, int32_t nbOutputs) const noexcept;
    bool readSizes(nvinfer1::PluginTensorDesc const* in, Sizes& sizes) const noexcept;

    OperatorSpec const& mSpec;
    nvinfer1::PluginFieldCollection const mFields{0, nullptr};
};

class Creator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit Creator(OperatorSpec const& spec) noexcept;

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    OperatorSpec const& mSpec;
    nvinfer1::PluginFieldCollection const mFields{0, nullptr};
};

} // namespace dynexport
