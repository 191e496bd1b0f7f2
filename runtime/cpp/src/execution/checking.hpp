// Checks a batch before any of it runs: rows, tokens, places of logits, forced decisions, depths.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "execution/calls.hpp"
#include "execution/decisions.hpp"

namespace dynexport {

// The checked part of each row of a batch; ``bundle`` is named in errors. Throws Error as for Executor::run.
std::vector<Part> checked_parts(const KvCache::State& cache, const Batch& batch, const DecisionReader& reader,
                                const std::string& bundle);

// The parts that have tokens, by depth, rows ascending within a depth. Throws Error for another number of depths.
std::vector<std::pair<const Depth*, std::vector<Part*>>> by_depth(std::vector<Part>& parts, const Batch& batch);

// Whether the layers and the name of two depths are the same.
bool same_depth(const Depth& one, const Depth& other);

// Whether rows are adjacent, in order, and all at one depth, so that one call runs them.
bool is_plain(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens,
              const std::vector<Depth>& depths);

}  // namespace dynexport
