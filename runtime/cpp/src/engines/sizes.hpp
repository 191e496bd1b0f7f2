// Sizes of arrays: products that are checked, and the shapes that a call's symbols give.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/engine.hpp"

namespace dynexport {

// The product of dimensions and the bytes of an element; none if a dimension is negative or the product overflows.
std::optional<std::size_t> bytes_of(const std::vector<std::int64_t>& shape, Type type);

// The size of every symbol of a graph's inputs, read from their shapes. Throws Error for a shape of another rank.
std::map<std::string, std::int64_t> sizes_of(const Graph& graph, const Shapes& shapes);

// A tensor's shape with symbols replaced by sizes. Throws Error for a symbol without a size.
std::vector<std::int64_t> sized(const TensorSpec& spec, const std::map<std::string, std::int64_t>& sizes);

bool is_cache_input(const TensorSpec& spec);
bool is_cache_output(const TensorSpec& spec);

}  // namespace dynexport
