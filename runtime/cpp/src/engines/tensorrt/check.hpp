// Checks by its record that an engine belongs to a bundle and can run here, before TensorRT reads it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dynexport/bundle.hpp"
#include "engines/tensorrt/gpu.hpp"
#include "engines/tensorrt/store.hpp"

namespace dynexport::tensorrt {

// The environment that an engine would run in.
struct Here {
  std::string backend, version;
  Gpu gpu;
  std::optional<std::string> plugins_sha256;
};

// Throws Error when a bundle's graphs are not written for TensorRT.
void check_target(const Bundle& bundle);

// The first of the engines, preferably one with weights, that belongs to a graph and can run here. Throws Error, with
// the reason for the first engine found, when there is none.
const Stored& engine_for(const Bundle& bundle, const Graph& graph, const std::vector<Stored>& engines,
                         const Here& here);

}  // namespace dynexport::tensorrt
