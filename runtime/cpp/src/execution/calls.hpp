// Splits a batch into calls: ranges of adjacent rows and chunks of prompts that the program and the caches accept.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "dynexport/executor.hpp"

namespace dynexport {

// The inputs of one call of a program: right-padded tokens for B neighbouring rows of a cache.
struct Call {
  std::int64_t first = 0, rows = 0;  // rows without tokens are computed as well, but add no entry
  std::int64_t tokens = 0;           // S
  std::int64_t asked = 0;            // K, logits per row; may be 0
  std::vector<std::int64_t> ids;     // [B, S]
  std::vector<std::int64_t> counts;  // [B], tokens of each row
  std::vector<std::int64_t> wanted;  // [B, K], indices among the S tokens whose logits are returned
  std::vector<std::int64_t> forced;  // [R, B, S], forced decisions or -1
  std::vector<std::uint8_t> active;  // [layers], whether a layer runs
  bool is_prompt = false;
};

// The result of one call; logits are valid until the next call of the same cache.
struct CallResult {
  const float* logits = nullptr;      // [B, places, vocab]
  std::int64_t places = 0;            // K or more
  std::vector<float> own;             // holds the logits where no engine does
  std::vector<std::int64_t> entries;  // [caches, B], new entries
  std::vector<Decisions> decisions;   // one per row; none without routers if the cache does not record
};

// One row's share of a batch, and its results so far.
struct Part {
  std::int64_t row = 0;
  std::vector<std::int64_t> ids;     // [n]
  std::vector<std::int64_t> wanted;  // ascending indices of the tokens whose logits are returned
  std::vector<std::int64_t> forced;  // [R, n]
  std::int64_t done = 0;             // tokens that have run
  std::vector<float> logits;
  std::vector<Decisions> decisions;  // one per finished chunk

  std::int64_t left() const { return static_cast<std::int64_t>(ids.size()) - done; }
};

// The chunk of a row's tokens that one call runs.
struct Slice {
  Part* part = nullptr;
  std::int64_t count = 0;

  // Indices within the chunk of the tokens whose logits are returned.
  std::vector<std::int64_t> wanted() const;
};

// Decides which rows and tokens share a call.
class Cutter {
 public:
  // ``graph``: its sizes also limit a call.
  Cutter(const KvCache::State& cache, const Limits& limits, const Graph& graph, const Chunks& chunk);

  using Parts = std::vector<Part*>;
  using Run = std::function<void(const std::vector<Slice>&)>;
  // Runs all tokens of some parts, rows ascending, call by call. ``run`` commits a call before it returns.
  void each(const Parts& parts, const Run& run) const;

 private:
  std::int64_t size(const Part& part, std::int64_t most) const;
  std::int64_t tokens_of_a_row(const Parts& parts, std::int64_t longest) const;
  std::vector<Parts> ranges(const Parts& parts, bool all_idle, std::int64_t tokens = 1) const;
  bool fits_between(std::int64_t first, std::int64_t last, bool all_idle, std::int64_t tokens) const;
  void side_by_side(const Parts& parts, std::int64_t most, const Run& run) const;
  void each_together(const Parts& parts, std::int64_t longest, std::int64_t most, const Run& run) const;
  bool is_empty(std::int64_t row) const;

  const KvCache::State& cache_;
  const Limits& limits_;
  const Chunks& chunk_;
  std::int64_t most_;
  bool pads_ = false;  // a set of graphs takes the tokens of all rows in one line
};

// The call that runs some chunks, at most one per row, rows ascending. ``decisions``: R.
Call call_of(const std::vector<Slice>& pieces, std::int64_t decisions, const std::vector<std::uint8_t>& active,
             bool is_prompt);

}  // namespace dynexport
