#include "engines/tensorrt/profiles.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

using Misfit = std::optional<std::pair<std::string, std::int64_t>>;

Misfit misfit(const Profile& profile, const Sizes& sizes) {
  for (const auto& [symbol, range] : profile.ranges) {
    const auto found = sizes.find(symbol);
    if (found != sizes.end() && (found->second < range.least || found->second > range.most)) return *found;
  }
  return std::nullopt;
}

// In floating point: a product of ranges may exceed 64 bits.
double width(const Profile& profile) {
  double product = 1;
  for (const auto& [symbol, range] : profile.ranges) product *= static_cast<double>(range.most - range.least + 1);
  return product;
}

bool narrower(const Profile& a, const Profile& b) { return width(a) < width(b); }

[[noreturn]] void refuse(const Graph& graph, const TensorSpec& spec, const std::string& expected,
                         const std::string& found) {
  throw Error("graph " + graph.name + ": input " + spec.name + ": expected " + expected + ", found " + found);
}

}  // namespace

Sizes sizes_of(const Graph& graph, const Shapes& shapes) {
  Sizes sizes;
  for (const TensorSpec& spec : graph.inputs) {
    if (spec.name.compare(0, kPast.size(), kPast) == 0) continue;
    const auto given = shapes.find(spec.name);
    if (given == shapes.end()) refuse(graph, spec, "a value", "none");
    const std::vector<std::int64_t>& shape = given->second;
    if (shape.size() != spec.shape.size()) {
      refuse(graph, spec, std::to_string(spec.shape.size()) + " dimensions", std::to_string(shape.size()));
    }
    for (std::size_t i = 0; i < shape.size(); ++i) {
      const Dimension& dimension = spec.shape[i];
      const std::int64_t expected =
          dimension.symbol.empty() ? dimension.size : sizes.emplace(dimension.symbol, shape[i]).first->second;
      if (shape[i] != expected || shape[i] < 0) refuse(graph, spec, std::to_string(expected), std::to_string(shape[i]));
    }
  }
  return sizes;
}

std::vector<std::int64_t> sized(const TensorSpec& spec, const Sizes& sizes) {
  std::vector<std::int64_t> shape;
  for (const Dimension& dimension : spec.shape) {
    const auto known = sizes.find(dimension.symbol);
    if (!dimension.symbol.empty() && known == sizes.end()) {
      throw Error(spec.name + ": expected a dimension of the inputs, found " + dimension.symbol);
    }
    shape.push_back(dimension.symbol.empty() ? dimension.size : known->second);
  }
  return shape;
}

int profile_for(const Graph& graph, const Sizes& sizes) {
  const std::vector<Profile>& profiles = graph.profiles;
  if (profiles.empty()) return 0;
  int best = -1;
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    if (misfit(profiles[i], sizes)) continue;
    if (best < 0 || narrower(profiles[i], profiles[static_cast<std::size_t>(best)])) best = static_cast<int>(i);
  }
  if (best >= 0) return best;
  const Profile& widest = *std::max_element(profiles.begin(), profiles.end(), narrower);
  const auto [symbol, size] = misfit(widest, sizes).value();
  const Range& range = widest.ranges.at(symbol);
  throw Error("graph " + graph.name + ": " + symbol + ": expected " + std::to_string(range.least) + " to " +
              std::to_string(range.most) + ", which profile " + widest.name + " was built for, found " +
              std::to_string(size) + "; convert with wider profiles and build again");
}

}  // namespace dynexport::tensorrt
