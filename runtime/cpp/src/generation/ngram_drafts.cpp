// Chains of tokens that a table foresees, and how far it is believed.
#include "generation/ngram_drafts.hpp"

#include <algorithm>
#include <utility>

namespace dynexport {
namespace {

// A chain of tokens ends where the table gives all of it together less than this.
constexpr double kLeast = 0.03;
// So many times likelier must a token of the table be than one of the text itself.
constexpr double kMuchLikelier = 1.5;
// The share by which what a text and a model have seen of the table is forgotten at a token.
constexpr double kForgottenByText = 0.02, kForgottenByModel = 0.001;
// How many expected tokens what is known before counts for: of other texts in a text, of the table in a model.
constexpr double kBeforeText = 5, kBeforeModel = 20;

}  // namespace

NgramLookup::NgramLookup(std::unique_ptr<const NgramTable> table)
    : table_(std::move(table)), trust_(kForgottenByModel, kBeforeModel) {}

Proposals NgramLookup::proposals(const Rows& rows, const Counts& most) {
  Proposals found = own_.proposals(rows, most);
  if (rows.size() > 1) return found;  // a further token of their calls costs more than such drafts yield
  for (const SpeculatedRow& row : rows) compare(*row.known);
  for (std::size_t place = 0; place < rows.size(); ++place) {
    const bool own = !found[place].chances.empty();
    const double enough = own ? found[place].chances.front() * kMuchLikelier : 0;
    if (enough >= 1) continue;
    Proposal other = foreseen(*rows[place].known, most[place]);
    if (own && (other.chances.empty() || enough >= other.chances.front())) continue;
    found[place] = std::move(other);
  }
  return found;
}

std::vector<Counts> NgramLookup::drafts(KvCache& cache, const Rows& rows, const Proposals& proposals,
                                        const Counts& counts) {
  return own_.drafts(cache, rows, proposals, counts);
}

// Compares a row's tokens since the last step with what the table expected in their places.
void NgramLookup::compare(KnownTokens& known) {
  const std::vector<std::int64_t>& ids = known.ids();
  if (!known.trust) {  // nothing but the prompt and a first token, which the table cannot be judged by
    known.trust.emplace(kForgottenByText, kBeforeText);
    known.compared = ids.size();
    return;
  }
  for (std::size_t place = known.compared; place < ids.size(); ++place) {
    const std::size_t length = std::min(kLongestContext, place);
    const auto found = table_->likeliest(ids.data() + (place - length), length);
    if (!found) continue;
    const bool came = found->token == ids[place];
    known.trust->add(found->probability, came);
    trust_.add(found->probability, came);
  }
  known.compared = ids.size();
}

// The chain of tokens that the table foresees.
Proposal NgramLookup::foreseen(const KnownTokens& known, std::int64_t most) const {
  Proposal result;
  result.foreseen = true;
  const double ratio = known.trust->ratio(trust_.ratio());
  const std::vector<std::int64_t>& ids = known.ids();
  std::vector<std::int64_t> context(ids.end() - static_cast<std::ptrdiff_t>(std::min(kLongestContext, ids.size())),
                                    ids.end());
  double chance = 1, expected = 1;
  while (static_cast<std::int64_t>(result.tokens.size()) < most) {
    const std::size_t length = std::min(kLongestContext, context.size());
    const auto found = table_->likeliest(context.data() + (context.size() - length), length);
    if (!found) break;
    expected *= found->probability;
    if (expected < kLeast) break;
    chance *= std::min(1.0, found->probability * ratio);
    result.tokens.push_back(found->token);
    result.chances.push_back(chance);
    context.push_back(found->token);
  }
  return result;
}

}  // namespace dynexport
