// Sizes of arrays, as Python's runtime/engines/inputs.py.
#include "engines/sizes.hpp"

#include "dynexport/error.hpp"

namespace dynexport {

std::optional<std::size_t> bytes_of(const std::vector<std::int64_t>& shape, Type type) {
  std::size_t bytes = size_of(type);
  for (const std::int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes)) return std::nullopt;
  return bytes;
}

std::int64_t Tensor::elements() const { return static_cast<std::int64_t>(bytes() / size_of(type)); }

std::size_t Tensor::bytes() const { return bytes_of(shape, type).value_or(0); }

std::map<std::string, std::int64_t> sizes_of(const Graph& graph, const Shapes& shapes) {
  std::map<std::string, std::int64_t> sizes;
  for (const TensorSpec& spec : graph.inputs) {
    const auto found = shapes.find(spec.name);
    if (found == shapes.end()) continue;
    if (found->second.size() != spec.shape.size())
      throw Error(graph.file + ": " + spec.name + ": expected an array of " + std::to_string(spec.shape.size()) +
                  " dimensions, found " + std::to_string(found->second.size()));
    for (std::size_t i = 0; i < spec.shape.size(); ++i)
      if (!spec.shape[i].symbol.empty()) sizes[spec.shape[i].symbol] = found->second[i];
  }
  return sizes;
}

std::vector<std::int64_t> sized(const TensorSpec& spec, const std::map<std::string, std::int64_t>& sizes) {
  std::vector<std::int64_t> shape;
  for (const Dimension& dimension : spec.shape) {
    if (dimension.symbol.empty()) {
      shape.push_back(dimension.size);
      continue;
    }
    const auto found = sizes.find(dimension.symbol);
    if (found == sizes.end()) {
      std::string known;
      for (const auto& [symbol, size] : sizes) known += (known.empty() ? "" : ", ") + symbol;
      throw Error(spec.name.substr(0, 80) + ": expected a dimension of " + known + ", found " +
                  dimension.symbol.substr(0, 40));
    }
    shape.push_back(found->second);
  }
  return shape;
}

bool is_cache_input(const TensorSpec& spec) { return spec.name.compare(0, kPast.size(), kPast) == 0; }

bool is_cache_output(const TensorSpec& spec) { return spec.name.compare(0, kPresent.size(), kPresent) == 0; }

}  // namespace dynexport
