#include "engines/tensorrt/profiles.hpp"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

using Sizes = std::map<std::string, std::int64_t>;
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

}  // namespace

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
