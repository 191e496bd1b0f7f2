// Runs requests to their end: their prompts, then decode steps of the rows that have not ended.
#pragma once

#include <vector>

#include "dynexport/executor.hpp"
#include "dynexport/generator.hpp"
#include "dynexport/kv_cache.hpp"
#include "dynexport/request.hpp"
#include "generation/speculation.hpp"

namespace dynexport {

// A prompt and its requests, which share one run of it where the strategy allows it.
struct Group {
  const std::vector<std::int64_t>& prompt;
  std::vector<Request> requests;
};

// Generates until all requests have ended; row by row within a step. ``cache`` has an acquired row per request, by its
// index; ``speculator`` is null for one token of a row in each step. Returns false if ``on_piece`` did.
bool run_requests(Executor& executor, KvCache& cache, std::vector<Group>& groups, const Chunks& chunk,
                  Speculator* speculator, const OnPiece& on_piece);

}  // namespace dynexport
