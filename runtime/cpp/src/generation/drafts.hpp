// Drafts the next tokens of rows cheaply, as Python's runtime/generation/drafts.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "dynexport/executor.hpp"
#include "dynexport/request.hpp"
#include "generation/draft_length.hpp"

namespace dynexport {

// A row's tokens, with the place of the latest occurrence of each short sequence of them.
class KnownTokens {
 public:
  void push(std::int64_t token);
  void push(const std::vector<std::int64_t>& tokens);
  // Up to ``most`` tokens that followed the latest earlier occurrence of the last ones; they repeat where it reaches
  // the end.
  std::vector<std::int64_t> continued(std::int64_t most) const;
  const std::vector<std::int64_t>& ids() const { return ids_; }

  // How often a table foresaw them; none before any was compared. ``compared``: the number of tokens, from the first
  // on, that are not to be compared any more.
  std::optional<Trust> trust;
  std::size_t compared = 0;

 private:
  std::vector<std::int64_t> ids_;
  std::map<std::vector<std::int64_t>, std::size_t> after_;
};

// A row of a step with drafts, and the tokens that it gets.
struct SpeculatedRow {
  Request* request = nullptr;
  std::int64_t row = 0;    // in the cache
  std::int64_t token = 0;  // the latest, which has not run
  KnownTokens* known = nullptr;
  Acceptance* acceptance = nullptr;
  std::int64_t most_drafts = 0;
  bool foreseen = false;      // whether its drafts come from a table, as Proposal says
  std::vector<Piece> pieces;  // of the step
  std::exception_ptr error;   // of Request::choose, after which the row cannot go on
};

using Rows = std::vector<SpeculatedRow>;
using Counts = std::vector<std::int64_t>;

// What can be drafted for a row.
struct Proposal {
  std::vector<double> chances;  // for each token the probability that it and all before it are accepted
  Counts tokens;                // if they are known before they are wanted
  bool foreseen = false;        // by a table that has probabilities of its own

  // Tokens that are accepted with one probability if all before them were.
  static Proposal alike(double rate, std::int64_t count, Counts tokens = {});
};
using Proposals = std::vector<Proposal>;

// Proposes tokens that the full model verifies.
class Drafter {
 public:
  Drafter() = default;
  Drafter(const Drafter&) = delete;
  Drafter& operator=(const Drafter&) = delete;
  virtual ~Drafter() = default;
  // What it can draft for each row, at most ``most`` tokens.
  virtual Proposals proposals(const Rows& rows, const Counts& most) = 0;
  // Up to ``counts`` tokens for each row; the cache is afterwards as before.
  virtual std::vector<Counts> drafts(KvCache& cache, const Rows& rows, const Proposals& proposals,
                                     const Counts& counts) = 0;
};

// Drafts by the row's own text: what followed its last tokens before.
class PromptLookup : public Drafter {
 public:
  Proposals proposals(const Rows& rows, const Counts& most) override;
  std::vector<Counts> drafts(KvCache& cache, const Rows& rows, const Proposals& proposals,
                             const Counts& counts) override;
};

// Drafts by running fewer layers of the same bundle. A draft is chosen as the full model would choose: greedily, or
// with the random number that its choice will use.
class ShallowDepth : public Drafter {
 public:
  ShallowDepth(Executor& executor, Depth depth) : executor_(executor), depth_(std::move(depth)) {}
  Proposals proposals(const Rows& rows, const Counts& most) override;
  std::vector<Counts> drafts(KvCache& cache, const Rows& rows, const Proposals& proposals,
                             const Counts& counts) override;

 private:
  Executor& executor_;
  Depth depth_;
};

}  // namespace dynexport
