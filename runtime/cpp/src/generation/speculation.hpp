// Decode steps with drafts, as Python's runtime/generation/speculation.py.
//
// Every token is chosen from the full model's logits with the row's own random numbers; drafts only decide how many
// tokens a call computes. So a row's tokens are those of decoding without drafts, but for rounding.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "dynexport/speculation.hpp"
#include "generation/drafts.hpp"

namespace dynexport {

// Learns how many drafts pay. For one thread at a time.
class Speculator {
 public:
  // Throws Error for options out of their range, and for a bundle whose tokens depend on the others of a call.
  Speculator(Executor& executor, const Speculation& speculation);

  std::int64_t most() const { return most_; }
  // The acceptance of a new row's drafts: a depth is as good as for the rows before, a text is new.
  Acceptance acceptance() const { return by_depth_ ? usual_.of_next_row() : Acceptance(kHopedOfLookup); }
  // Runs a decode step. Every row takes its new tokens, at least one, or has an error. Throws as Executor::run.
  void step(KvCache& cache, Rows& rows);
  // Time of the engine's calls in the latest step.
  double engine_seconds() const { return engine_seconds_; }

 private:
  std::int64_t count(const Proposals& proposals) const;
  std::vector<Counts> drafts(KvCache& cache, Rows& rows);
  void verify(KvCache& cache, Rows& rows, const std::vector<Counts>& drafts);
  void verify_one_each(KvCache& cache, Rows& rows);
  void learn(const Rows& rows, const std::vector<Counts>& drafts);

  Executor& executor_;
  std::int64_t most_;
  bool always_, by_depth_;
  double draft_share_ = 0, engine_seconds_ = 0;
  Acceptance usual_;
  std::unique_ptr<Drafter> drafter_;
  CallTimes calls_;
};

// A model's speculators, which keep what they have learned from one generation to the next. Threads may share it.
class Speculators {
 public:
  // Comes back when it is reset.
  using Lent = std::unique_ptr<Speculator, std::function<void(Speculator*)>>;

  // A speculator that no other generation uses meanwhile. Throws as Speculator does.
  Lent lend(Executor& executor, const Speculation& speculation);

 private:
  std::mutex mutex_;
  std::vector<std::pair<Speculation, std::unique_ptr<Speculator>>> idle_;
};

// Lets a row take its next tokens, until one differs from its draft or ends the request; an error of Request::choose
// is kept in the row. ``logits``: [1 + drafts, vocab], of its latest token and of its drafts.
void take(SpeculatedRow& row, const float* logits, std::int64_t vocabulary, const Counts& drafts);

}  // namespace dynexport
