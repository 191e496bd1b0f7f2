// Arranges the rows of a cache: which answer moves where, so that rows that share a call are adjacent.
#pragma once

#include <memory>
#include <vector>

#include "dynexport/kv_cache.hpp"
#include "dynexport/work.hpp"

namespace dynexport {

using AnswerGroup = std::vector<std::shared_ptr<Answer>>;

// Moves the answers of each group to adjacent rows, the first group from row 0; answers stay where they can. ``groups``
// are all answers that hold rows. Does nothing if a move is needed and no row of the cache is free: rows that are not
// adjacent only cost time.
void arrange(KvCache& cache, const std::vector<AnswerGroup>& groups);

}  // namespace dynexport
