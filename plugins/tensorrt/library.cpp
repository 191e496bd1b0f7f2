// The exports of the library. IPluginRegistry::loadLibrary calls the first two; a program that opens the library itself
// calls the third once.
#include "plugin.h"

#define DYNEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

namespace
{

std::array<dynexport::Creator, 4> gCreators{dynexport::Creator{dynexport::kOperators[0]},
    dynexport::Creator{dynexport::kOperators[1]}, dynexport::Creator{dynexport::kOperators[2]},
    dynexport::Creator{dynexport::kOperators[3]}};

std::array<nvinfer1::IPluginCreatorInterface*, 4> const gInterfaces{
    &gCreators[0], &gCreators[1], &gCreators[2], &gCreators[3]};

} // namespace

DYNEXPORT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    dynexport::setFinder(finder);
}

DYNEXPORT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    nbCreators = static_cast<int32_t>(gInterfaces.size());
    return gInterfaces.data();
}

// Registers the creators in TensorRT's own registry. logger: an ILogger or null. False if one existed.
DYNEXPORT_EXPORT bool initDynexportPlugins(void* logger)
{
    dynexport::setLogger(static_cast<nvinfer1::ILogger*>(logger));
    nvinfer1::IPluginRegistry* const registry = getPluginRegistry();
    bool registered = registry != nullptr;
    for (nvinfer1::IPluginCreatorInterface* const creator : gInterfaces)
    {
        registered = registered && registry->registerCreator(*creator, dynexport::kNamespace);
    }
    return registered;
}
