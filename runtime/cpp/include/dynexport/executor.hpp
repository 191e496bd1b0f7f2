// The driver of every bundle: checks a batch, splits it into calls, runs them, commits their cache entries.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "dynexport/kv_cache.hpp"

namespace dynexport {

// Chunks of a prompt. With ``even``, a later chunk has fewer tokens so that all take about as long (Python's
// EvenChunks); else every chunk has ``first`` tokens.
struct Chunks {
  std::int64_t first = 1024;
  bool even = false;

  std::int64_t size(std::int64_t position) const;
};

enum class Wanted { kLast, kAll, kGiven };

// New tokens for some rows of a cache; as Python's Batch.
struct Batch {
  std::vector<std::int64_t> rows;
  std::vector<std::vector<std::int64_t>> tokens;
  Phase phase = Phase::kPrompt;
  std::vector<Depth> depths;  // one for all rows, or one per row
  Wanted wanted = Wanted::kLast;
  std::vector<std::vector<std::int64_t>> places;  // with kGiven: ascending indices into each row's tokens
  std::vector<std::vector<std::int64_t>> forced;  // empty, or per row [R, n]; -1 leaves a decision to its router
  Chunks chunk;
};

struct StepResult {
  std::vector<std::vector<float>> logits;          // per row [k, vocab]
  std::vector<std::vector<std::int64_t>> entries;  // per row [places]: new entries
  std::vector<Decisions> decisions;                // per row; empty for a bundle without routers
};

// A bundle's programs, each loaded at its first use. Threads may share an executor if each uses its own caches.
class Executor {
 public:
  // ``threads`` and the engine library are in the options. Throws Error when the bundle cannot run there.
  Executor(std::shared_ptr<const Bundle> bundle, const BackendOptions& options);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  const Bundle& bundle() const;
  const Manifest& manifest() const;
  const Limits& limits() const;
  std::int64_t decision_rows() const;  // R; 0 without routers

  std::unique_ptr<KvCache> cache(std::int64_t rows, std::int64_t tokens, bool record = false,
                                 std::optional<std::int64_t> room = std::nullopt) const;

  // Runs a batch; when it fails, the caches are as before it. Errors as for Python's Executor.run.
  StepResult run(KvCache& cache, const Batch& batch);

  // Feeds one generated token to each of some rows. Returns logits float32 [rows, vocab], valid until the cache's next
  // run.
  const float* decode(KvCache& cache, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens,
                      const std::vector<Depth>& depths);

  // Keeps the first generated tokens, at least one, that ran since a mark, as if those after them had never run; where
  // their entries do not come first in their caches, they run again. ``decisions``: of all tokens that ran; null
  // without routers.
  void keep_first(KvCache& cache, const Mark& mark, const std::vector<std::int64_t>& tokens, const Depth& depth,
                  const Decisions* decisions);

  // Loads the program of a phase and depth now, not at its first use.
  void load(Phase phase, const Depth& depth);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
