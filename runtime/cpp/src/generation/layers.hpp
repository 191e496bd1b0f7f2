// The depth that a token ran at.
#pragma once

#include <cstdint>

#include "dynexport/kv_cache.hpp"
#include "dynexport/manifest.hpp"

namespace dynexport {

// Returns the number of layers that a row's last token ran in, or the ``from_end``-th from its end: by the decisions
// that the cache recorded, else by the row's depth; ``generated`` tells whether that token was generated.
std::int64_t last_layers(const KvCache& cache, std::int64_t row, const Depth& depth, bool generated,
                         std::int64_t from_end = 1);

}  // namespace dynexport
