// Where drafts come from.
#include "generation/drafts.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dynexport {
namespace {

// Lengths of the token sequences that prompt lookup searches for, longest first.
constexpr std::size_t kLookedUp[] = {4, 3, 2};

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

}  // namespace

void KnownTokens::push(std::int64_t token) {
  for (const std::size_t size : kLookedUp)
    if (ids_.size() >= size) after_[{ids_.end() - static_cast<std::ptrdiff_t>(size), ids_.end()}] = ids_.size();
  ids_.push_back(token);
}

void KnownTokens::push(const std::vector<std::int64_t>& tokens) {
  for (const std::int64_t token : tokens) push(token);
}

std::vector<std::int64_t> KnownTokens::continued(std::int64_t most) const {
  std::vector<std::int64_t> found;
  for (const std::size_t size : kLookedUp) {
    if (ids_.size() <= size) continue;
    const auto known = after_.find({ids_.end() - static_cast<std::ptrdiff_t>(size), ids_.end()});
    if (known == after_.end()) continue;
    const std::size_t period = ids_.size() - known->second;
    for (std::int64_t index = 0; index < most; ++index) found.push_back(ids_[known->second + at(index) % period]);
    return found;
  }
  return found;
}

Proposal Proposal::alike(double rate, std::int64_t count, Counts tokens) {
  Proposal found;
  for (std::int64_t index = 1; index <= count; ++index)
    found.chances.push_back(std::pow(rate, static_cast<double>(index)));
  found.tokens = std::move(tokens);
  return found;
}

Proposals PromptLookup::proposals(const Rows& rows, const Counts& most) {
  Proposals found;
  for (std::size_t place = 0; place < rows.size(); ++place) {
    Counts tokens = rows[place].known->continued(most[place]);
    const auto count = static_cast<std::int64_t>(tokens.size());
    found.push_back(Proposal::alike(rows[place].acceptance->rate(), count, std::move(tokens)));
  }
  return found;
}

std::vector<Counts> PromptLookup::drafts(KvCache&, const Rows&, const Proposals& proposals, const Counts& counts) {
  std::vector<Counts> found;
  for (std::size_t place = 0; place < proposals.size(); ++place) {
    const Counts& tokens = proposals[place].tokens;
    found.emplace_back(tokens.begin(), tokens.begin() + counts[place]);
  }
  return found;
}

Proposals ShallowDepth::proposals(const Rows& rows, const Counts& most) {
  Proposals found;
  for (std::size_t place = 0; place < rows.size(); ++place)
    found.push_back(Proposal::alike(rows[place].acceptance->rate(), most[place]));
  return found;
}

std::vector<Counts> ShallowDepth::drafts(KvCache& cache, const Rows& rows, const Proposals&, const Counts& counts) {
  std::vector<Mark> marks;
  for (const SpeculatedRow& row : rows) marks.push_back(cache.mark(row.row));
  std::vector<Counts> found(rows.size());
  const std::int64_t most = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  for (std::int64_t index = 0; index < most; ++index) {
    std::vector<std::size_t> going;
    Counts its_rows, tokens;
    for (std::size_t place = 0; place < rows.size(); ++place) {
      if (counts[place] <= index) continue;
      going.push_back(place);
      its_rows.push_back(rows[place].row);
      tokens.push_back(index > 0 ? found[place].back() : rows[place].token);
    }
    const float* logits = executor_.decode(cache, its_rows, tokens, std::vector<Depth>(going.size(), depth_));
    for (const std::size_t place : going) {
      found[place].push_back(rows[place].request->draft(logits, index));
      logits += executor_.manifest().model.vocab_size;
    }
  }
  for (const Mark& mark : marks) cache.truncate(mark.row, mark);
  return found;
}

}  // namespace dynexport
