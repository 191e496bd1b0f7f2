// How many drafts pay, by the acceptance of earlier ones and the times of calls.
#include "generation/draft_length.hpp"

#include <algorithm>
#include <iterator>

namespace dynexport {
namespace {

// Weight of the latest draft in the average.
constexpr double kLatestDraft = 0.3;
// Time of a further token of a call, as a share of a plain step's, before it is known.
constexpr double kFirstGuess = 0.1;

}  // namespace

void CallTimes::add(std::int64_t tokens, double seconds) {
  const auto [found, made] = seconds_.try_emplace(tokens, seconds);
  if (made) return;
  double& known = found->second;  // a time that is far from the average counts as twice or half of it
  known += kLatest * (std::min(std::max(seconds, known / 2), known * 2) - known);
}

double CallTimes::of(std::int64_t tokens) const {
  if (seconds_.empty()) return 0;
  const auto after = seconds_.lower_bound(tokens);
  if (after == seconds_.end()) {
    const auto& [least, first] = *seconds_.begin();
    const auto& [last, seconds] = *seconds_.rbegin();
    return seconds + static_cast<double>(tokens - last) * kFirstGuess * first / static_cast<double>(least);
  }
  if (after->first == tokens || after == seconds_.begin()) return after->second;
  const auto before = std::prev(after);
  const double share = static_cast<double>(tokens - before->first) / static_cast<double>(after->first - before->first);
  return before->second + share * (after->second - before->second);
}

Acceptance Acceptance::of_next_row() const {
  Acceptance following(hoped_);
  following.rate_ = rate_;
  following.return_ = return_;
  return following;
}

void Acceptance::add(std::int64_t drafted, std::int64_t accepted, bool foreseen) {
  drafted_ += drafted;
  accepted_ += accepted;
  if (foreseen) drafted = accepted = 0;
  if (drafted == 0) {
    rate_ += return_ * (hoped_ - rate_);
  } else if (accepted == 0) {
    return_ = std::max(return_ / 2, kReturn / 8);
  } else if (accepted == drafted) {
    return_ = kReturn;
  }
  for (std::int64_t tried = 0; tried < std::min(drafted, accepted + 1); ++tried)
    rate_ += kLatestDraft * ((tried < accepted ? 1.0 : 0.0) - rate_);
}

std::int64_t best_count(const std::vector<std::vector<double>>& chances, const CallTimes& calls, double draft_share,
                        double least_gain) {
  const auto rows = static_cast<std::int64_t>(chances.size());
  const double plain = calls.of(rows);
  if (plain == 0) return 0;
  std::int64_t best = 0, tokens = rows;
  double most = 0, expected = static_cast<double>(rows);
  std::size_t last = 0;
  for (const auto& row : chances) last = std::max(last, row.size());
  for (std::size_t count = 0; count <= last; ++count) {
    if (count > 0) {
      tokens += rows;  // rows with fewer drafts are padded
      for (const auto& row : chances)
        if (row.size() >= count) expected += row[count - 1];
    }
    const double speed = expected / (calls.of(tokens) + static_cast<double>(count) * draft_share * plain);
    if (count == 0) {
      most = speed * least_gain;
    } else if (speed > most) {
      best = static_cast<std::int64_t>(count), most = speed;
    }
  }
  return best;
}

}  // namespace dynexport
