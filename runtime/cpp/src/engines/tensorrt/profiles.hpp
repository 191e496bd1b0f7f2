// The optimization profile that accepts the sizes of a call.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "dynexport/manifest.hpp"

namespace dynexport::tensorrt {

// Returns the index of the narrowest profile that accepts a step, by its sizes. Throws Error, naming the size and the
// range that the engine was built for, when there is none.
int profile_for(const Graph& graph, const std::map<std::string, std::int64_t>& sizes);

}  // namespace dynexport::tensorrt
