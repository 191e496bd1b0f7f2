// Counts the layers of a token.
#include "generation/layers.hpp"

namespace dynexport {

std::int64_t last_layers(const KvCache& cache, std::int64_t row, const Depth& depth, bool generated,
                         std::int64_t from_end) {
  const std::vector<Decisions>& log = cache.log(row);
  for (auto run = log.rbegin(); run != log.rend(); ++run) {
    if (run->tokens < from_end) {
      from_end -= run->tokens;
      continue;
    }
    const auto tokens = static_cast<std::size_t>(run->tokens), token = static_cast<std::size_t>(run->tokens - from_end);
    std::int64_t layers = 0;
    for (std::size_t place = token; place < run->ran.size(); place += tokens) layers += run->ran[place];
    return layers;
  }
  return static_cast<std::int64_t>(generated ? depth.keep.size() : depth.prompt.size());
}

}  // namespace dynexport
