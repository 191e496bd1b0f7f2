// Runs a graph's engine: inputs are copied to the GPU, caches stay there, results are copied back.
#pragma once

#include <memory>
#include <string>

#include "dynexport/engine.hpp"
#include "engines/tensorrt/device.hpp"
#include "engines/tensorrt/library.hpp"

namespace dynexport::tensorrt {

// Deserializes an engine whose record was checked. Throws Error when TensorRT refuses it, or the GPU lacks memory.
std::unique_ptr<Engine> open_engine(const Graph& graph, const std::shared_ptr<Library>& library,
                                    const std::shared_ptr<Device>& device, const std::string& content);

}  // namespace dynexport::tensorrt
