// Checks a batch before any of it runs, as Python's runtime/execution/checking.py.
#include "execution/checking.hpp"

#include <algorithm>
#include <numeric>
#include <set>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"
#include "execution/checks.hpp"

namespace dynexport {
namespace {

using Longs = std::vector<std::int64_t>;

void check_tokens(const KvCache::State& cache, const Batch& batch, std::int64_t row, const Longs& ids) {
  const bool is_prompt = batch.phase == Phase::kPrompt;
  check_ids(is_prompt ? "prompt" : "tokens", ids, cache.manifest().model.vocab_size);
  if (ids.empty() && is_prompt) throw Error("prompt: expected at least one token, found none");
  cache.check_room(row, static_cast<std::int64_t>(ids.size()), is_prompt);
}

// The ascending indices of the tokens of row ``i`` of a batch that get logits.
Longs wanted_of(const Batch& batch, std::size_t i) {
  const auto count = static_cast<std::int64_t>(batch.tokens[i].size());
  if (batch.wanted == Wanted::kGiven) {
    const Longs& places = batch.places[i];
    for (const std::int64_t place : places) checked_count("logits_at", place, 0, count - 1);
    if (std::adjacent_find(places.begin(), places.end(), std::greater_equal<>()) != places.end())
      throw Error("logits_at: expected ascending places, found " + listed(places));
    return places;
  }
  if (batch.wanted == Wanted::kLast) return count > 0 ? Longs{count - 1} : Longs{};
  Longs all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// The caller's decisions for row ``i`` of a batch, [R, n]; -1 leaves one to its router.
Longs forced_of(const Batch& batch, std::size_t i, const DecisionReader& reader, const std::string& bundle) {
  const std::size_t count = batch.tokens[i].size(), all = static_cast<std::size_t>(reader.rows()) * count;
  if (batch.forced.empty() || batch.forced[i].empty()) return Longs(all, -1);
  if (reader.rows() == 0) throw Error("forced: expected None, as " + bundle + " has no routers; found decisions");
  const Longs& wish = batch.forced[i];
  if (wish.size() != all)
    throw Error("forced: expected bool or whole numbers of shape " +
                listed({reader.rows(), static_cast<std::int64_t>(count)}) + ", found int64 " +
                listed({static_cast<std::int64_t>(wish.size())}));
  reader.check_forced(wish, static_cast<std::int64_t>(count));
  return wish;
}

}  // namespace

std::vector<Part> checked_parts(const KvCache::State& cache, const Batch& batch, const DecisionReader& reader,
                                const std::string& bundle) {
  const Longs& rows = batch.rows;
  for (const std::int64_t row : rows) cache.check(row);
  if (std::set<std::int64_t>(rows.begin(), rows.end()).size() < rows.size())
    throw Error("rows: expected each row of a batch once, found " + listed(rows));
  checked_count("chunk", batch.chunk.first);
  check_for_rows(batch.phase == Phase::kPrompt ? "prompts" : "tokens", batch.tokens.size(), rows.size());
  if (!batch.forced.empty()) check_for_rows("forced", batch.forced.size(), rows.size());
  if (batch.wanted == Wanted::kGiven) check_for_rows("logits_at", batch.places.size(), rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) check_tokens(cache, batch, rows[i], batch.tokens[i]);
  std::vector<Part> parts;
  for (std::size_t i = 0; i < rows.size(); ++i)
    parts.push_back({rows[i], batch.tokens[i], wanted_of(batch, i), forced_of(batch, i, reader, bundle), 0, {}, {}});
  return parts;
}

bool same_depth(const Depth& one, const Depth& other) {
  return one.name == other.name && one.keep == other.keep && one.prompt == other.prompt;
}

std::vector<std::pair<const Depth*, std::vector<Part*>>> by_depth(std::vector<Part>& parts, const Batch& batch) {
  if (batch.depths.size() != 1) check_for_rows("depth", batch.depths.size(), parts.size());
  std::vector<std::pair<const Depth*, std::vector<Part*>>> groups;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].left() == 0) continue;
    const Depth& depth = batch.depths[batch.depths.size() == 1 ? 0 : i];
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](const auto& known) { return same_depth(*known.first, depth); });
    if (group == groups.end()) group = groups.insert(groups.end(), {&depth, {}});
    group->second.push_back(&parts[i]);
  }
  for (auto& [depth, group] : groups)
    std::sort(group.begin(), group.end(), [](const Part* one, const Part* other) { return one->row < other->row; });
  return groups;
}

bool is_plain(const Longs& rows, const Longs& tokens, const std::vector<Depth>& depths) {
  if (tokens.size() != rows.size() || (depths.size() != rows.size() && depths.size() != 1)) return false;
  for (std::size_t i = 1; i < rows.size(); ++i)
    if (rows[i] - 1 != rows[i - 1] || !same_depth(depths.front(), depths[depths.size() == 1 ? 0 : i])) return false;
  return true;
}

}  // namespace dynexport
