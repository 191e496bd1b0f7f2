// Asks the plugin library what it would tell TensorRT, without TensorRT: one line an answer.
//
//   ask_library <library> <operator> <rank of every input> -- <type of every input>
#include <NvInferRuntime.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

// A size that says where it is from: 100 * input + axis.
class Place final : public IDimensionExpr
{
public:
    explicit Place(int64_t value)
        : mValue(value)
    {
    }
    int64_t getConstantValueImpl() const noexcept
    {
        return mValue;
    }

private:
    int64_t mValue;
};

class NoExpressions final : public IExprBuilder
{
};

class Log final : public ILogger
{
public:
    void log(Severity, AsciiChar const* message) noexcept override
    {
        std::printf("logged %s\n", message);
    }
};

class Finder final : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return &mLog;
    }

private:
    Log mLog;
};

IPluginCreatorV3One* find(IPluginCreatorInterface* const* creators, int32_t count, char const* name)
{
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator->getPluginName(), name) == 0)
        {
            return creator;
        }
    }
    return nullptr;
}

void askShapes(IPluginV3OneBuildV2& build, std::vector<int32_t> const& ranks)
{
    std::vector<std::unique_ptr<Place>> places;
    std::vector<DimsExprs> inputs(ranks.size());
    for (size_t i = 0; i < ranks.size(); ++i)
    {
        inputs[i].nbDims = ranks[i];
        for (int32_t axis = 0; axis < ranks[i]; ++axis)
        {
            places.push_back(std::make_unique<Place>(100 * static_cast<int64_t>(i) + axis));
            inputs[i].d[axis] = places.back().get();
        }
    }
    NoExpressions builder;
    std::vector<DimsExprs> outputs(build.getNbOutputs());
    int32_t const code = build.getOutputShapes(
        inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs.data(), build.getNbOutputs(), builder);
    std::printf("shapes %d", code);
    for (DimsExprs const& output : outputs)
    {
        for (int32_t axis = 0; code == 0 && axis < output.nbDims; ++axis)
        {
            std::printf(" %d", static_cast<int>(static_cast<Place const*>(output.d[axis])->getConstantValueImpl()));
        }
        std::printf(" |");
    }
    std::printf("\n");
}

// Which types are taken at every place, after the types given for the places before.
void askFormats(IPluginV3OneBuildV2& build, std::vector<DataType> types)
{
    auto const inputs = static_cast<int32_t>(types.size());
    std::vector<DataType> outputs(build.getNbOutputs());
    build.getOutputDataTypes(outputs.data(), build.getNbOutputs(), types.data(), inputs);
    types.insert(types.end(), outputs.begin(), outputs.end());
    std::vector<DynamicPluginTensorDesc> descs(types.size());
    std::printf("types");
    for (size_t pos = 0; pos < types.size(); ++pos)
    {
        for (int32_t type = 0; type <= static_cast<int32_t>(DataType::kINT64); ++type)
        {
            descs[pos].desc.type = static_cast<DataType>(type);
            descs[pos].desc.format = TensorFormat::kLINEAR;
            if (build.supportsFormatCombination(
                    static_cast<int32_t>(pos), descs.data(), inputs, build.getNbOutputs()))
            {
                std::printf(" %d", type);
            }
            descs[pos].desc.format = TensorFormat::kCHW32;
            if (build.supportsFormatCombination(
                    static_cast<int32_t>(pos), descs.data(), inputs, build.getNbOutputs()))
            {
                std::printf(" not linear");
            }
        }
        descs[pos].desc.type = types[pos];
        std::printf(" |");
    }
    std::printf("\n");
}

// Whether shapes are taken in which every size is 5, and those in which the first input's first is 6.
void askSizes(IPluginV3OneRuntime& run, int32_t outputs, std::vector<int32_t> const& ranks)
{
    std::vector<PluginTensorDesc> inputs(ranks.size());
    for (size_t i = 0; i < ranks.size(); ++i)
    {
        inputs[i].dims.nbDims = ranks[i];
        std::fill_n(inputs[i].dims.d, ranks[i], 5);
    }
    auto const count = static_cast<int32_t>(ranks.size());
    std::printf("sizes %d\n", run.onShapeChange(inputs.data(), count, nullptr, outputs));
    inputs[0].dims.d[0] = 6;
    std::printf("sizes %d\n", run.onShapeChange(inputs.data(), count, nullptr, outputs));
}

} // namespace

int main(int argc, char** argv)
{
    void* const library = dlopen(argv[1], RTLD_LAZY);
    if (library == nullptr)
    {
        std::printf("%s\n", dlerror());
        return 1;
    }
    auto const getCreators
        = reinterpret_cast<IPluginCreatorInterface* const* (*) (int32_t&)>(dlsym(library, "getCreators"));
    auto const setLoggerFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    Finder finder;
    setLoggerFinder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    IPluginCreatorV3One* const creator = find(creators, count, argv[2]);
    std::vector<int32_t> ranks;
    std::vector<DataType> types;
    bool after = false;
    for (int i = 3; i < argc; ++i)
    {
        if (std::strcmp(argv[i], "--") == 0)
        {
            after = true;
        }
        else if (after)
        {
            types.push_back(static_cast<DataType>(std::atoi(argv[i])));
        }
        else
        {
            ranks.push_back(std::atoi(argv[i]));
        }
    }
    std::printf("creators %d %s %s\n", count, creator->getPluginNamespace(), creator->getPluginVersion());
    PluginField const field{"k", nullptr, PluginFieldType::kINT32, 1};
    PluginFieldCollection const fields{1, &field};
    std::printf("with a field %d\n", creator->createPlugin("p", &fields, TensorRTPhase::kBUILD) != nullptr);
    std::unique_ptr<IPluginV3> const first{creator->createPlugin("p", nullptr, TensorRTPhase::kBUILD)};
    std::unique_ptr<IPluginV3> const plugin{first->clone()};
    auto& core = *static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    auto& build = *static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto& run = *static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::printf("name %s outputs %d alias %d fields %d\n", core.getPluginName(), build.getNbOutputs(),
        build.getAliasedInput(0), run.getFieldsToSerialize()->nbFields);
    askShapes(build, ranks);
    askFormats(build, types);
    askSizes(run, build.getNbOutputs(), ranks);
    ++ranks[0];
    askShapes(build, ranks);
    return 0;
}
