// Consecutive decode steps of the same rows at one depth, with inputs and caches bound once to the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dynexport/kv_cache.hpp"

namespace dynexport {

class WholeStep;
struct Call;

// A decode step of adjacent rows, bound to their caches; a run writes only the inputs that change.
class PlainStep {
 public:
  PlainStep(const WholeStep& running, const KvCache::State& cache, const Call& call);

  // Runs the step with one token per row and commits its entries. Returns logits [rows, vocab], which the next run
  // overwrites. Throws Error when the engine fails.
  const float* run(KvCache::State& cache, const std::vector<std::int64_t>& ids);

 private:
  std::int64_t first_;
  std::vector<std::int64_t> counts_, places_, entries_;
  std::vector<Decisions> none_;
  std::shared_ptr<Engine> engine_;  // outlives the binding
  std::unique_ptr<Binding> binding_;
  std::int64_t *ids_, *positions_, *lengths_;
  const float* logits_;
};

// The rows and the depth of a cache's latest decode step, and the bound step from the second one on.
struct LatestStep {
  std::int64_t first = 0, rows = 0;  // no rows: there was none
  Depth depth;
  std::unique_ptr<PlainStep> bound;

  bool is(std::int64_t other_first, std::int64_t other_rows, const Depth& other) const;
};

}  // namespace dynexport
