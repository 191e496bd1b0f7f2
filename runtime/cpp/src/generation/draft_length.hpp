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
  // Adds the result of a step; drafts that a table foresaw are counted, and say nothing of the others.
  void add(std::int64_t drafted, std::int64_t accepted, bool foreseen = false);
  double rate() const { return rate_; }
  std::int64_t drafted() const { return drafted_; }
  std::int64_t accepted() const { return accepted_; }

 private:
  double hoped_, rate_, return_ = kReturn;
  std::int64_t drafted_ = 0, accepted_ = 0;
};

// How often a table's tokens came true, beside how often it expected that.
class Trust {
 public:
  // ``forgotten``: the share that is forgotten at a token; ``before``: how many expected tokens the ratio that was
  // known before counts for.
  Trust(double forgotten, double before) : kept_(1 - forgotten), before_(before) {}

  void add(double expected, bool came) {
    expected_ = kept_ * expected_ + expected;
    came_ = kept_ * came_ + (came ? 1.0 : 0.0);
  }
  // ``known``: the ratio before any token was seen.
  double ratio(double known = 1) const { return (came_ + before_ * known) / (expected_ + before_); }

 private:
  double kept_, before_, expected_ = 0, came_ = 0;
};

// The largest number of drafts of a row by which tokens per second are expected to be most. ``chances``: per row and
// draft that it may have, the probability that it and all before it are accepted; ``draft_share``: the time of one
// draft of all rows, as a share of a plain step's; ``least_gain``: how many times as many tokens a second drafts must
// promise, to be made at all.
std::int64_t best_count(const std::vector<std::vector<double>>& chances, const CallTimes& calls, double draft_share,
                        double least_gain);

}  // namespace dynexport
