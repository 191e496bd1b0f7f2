// Drafts by the row's own text or, where that knows less, by the bundle's table of short token sequences, as Python's
// runtime/generation/ngram_drafts.py.
#pragma once

#include <memory>
#include <vector>

#include "bundle/ngrams.hpp"
#include "generation/drafts.hpp"

namespace dynexport {

// Every new token of a row is compared with what the table expected, drafted or not, so that the table is turned off
// and on at no cost.
class NgramLookup : public Drafter {
 public:
  explicit NgramLookup(std::unique_ptr<const NgramTable> table);
  Proposals proposals(const Rows& rows, const Counts& most) override;
  std::vector<Counts> drafts(KvCache& cache, const Rows& rows, const Proposals& proposals,
                             const Counts& counts) override;

 private:
  void compare(KnownTokens& known);
  Proposal foreseen(const KnownTokens& known, std::int64_t most) const;

  std::unique_ptr<const NgramTable> table_;
  PromptLookup own_;
  Trust trust_;
};

}  // namespace dynexport
