// The sizes of a call, and the optimization profile that accepts them.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "dynexport/engine.hpp"

namespace dynexport::tensorrt {

// Sizes by symbol.
using Sizes = std::map<std::string, std::int64_t>;

// The size of every symbol of a graph's inputs except caches. Throws Error for an input that is missing, or of other
// dimensions than the manifest's.
Sizes sizes_of(const Graph& graph, const Shapes& shapes);

// A shape with its symbols replaced. Throws Error for a symbol without a size.
std::vector<std::int64_t> sized(const TensorSpec& spec, const Sizes& sizes);

// The index of the narrowest profile that accepts a step. Throws Error, naming the size and the range that the engine
// was built for, when there is none.
int profile_for(const Graph& graph, const Sizes& sizes);

}  // namespace dynexport::tensorrt
