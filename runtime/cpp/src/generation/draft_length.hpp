// Chooses how many tokens to draft, as Python's runtime/generation/draft_length.py.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace dynexport {

// Weight of the latest time in the averages.
constexpr double kLatest = 0.2;
// Acceptance before it is known, of drafts that cost nothing and of those of a depth.
constexpr double kHopedOfLookup = 0.5, kHopedOfDepth = 0.8;

// The share by which an acceptance returns there in a step without drafts; halved, down to an eighth, whenever drafts
// were tried in vain.
constexpr double kReturn = 0.005;

// Average times of calls by their number of tokens, padding included.
class CallTimes {
 public:
  void add(std::int64_t tokens, double seconds);
  // Known, between known ones, or a hopeful guess; 0 if none is known.
  double of(std::int64_t tokens) const;

 private:
  std::map<std::int64_t, double> seconds_;
};

// The probability that a row's next draft is accepted if all before it were.
class Acceptance {
 public:
  explicit Acceptance(double hoped = kHopedOfLookup) : hoped_(hoped), rate_(hoped) {}

  // The acceptance of another row, whose drafts are expected to be accepted as these are.
  Acceptance of_next_row() const;
  void add(std::int64_t drafted, std::int64_t accepted);
  double rate() const { return rate_; }
  std::int64_t drafted() const { return drafted_; }
  std::int64_t accepted() const { return accepted_; }

 private:
  double hoped_, rate_, return_ = kReturn;
  std::int64_t drafted_ = 0, accepted_ = 0;
};

// The largest number of drafts of a row by which tokens per second are expected to be most. ``available``: the most
// drafts of each row; ``draft_share``: the time of one draft of all rows, as a share of a plain step's.
std::int64_t best_count(const std::vector<double>& rates, const std::vector<std::int64_t>& available,
                        const CallTimes& calls, double draft_share);

}  // namespace dynexport
