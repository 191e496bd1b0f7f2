// Counts the layers of a token.
#include "generation/layers.hpp"

namespace dynexport {

std::int64_t last_layers(const KvCache& cache, std::int64_t row, const Depth& depth, bool generated) {
  const std::vector<Decisions>& log = cache.log(row);
  if (log.empty()) return static_cast<std::int64_t>(generated ? depth.keep.size() : depth.prompt.size());
  const Decisions& last = log.back();
  const auto tokens = static_cast<std::size_t>(last.tokens);
  std::int64_t layers = 0;
  for (std::size_t place = tokens; place <= last.ran.size() && tokens > 0; place += tokens)
    layers += last.ran[place - 1];
  return layers;
}

}  // namespace dynexport
