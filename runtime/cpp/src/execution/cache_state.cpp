// The parts of a KvCache, as Python's runtime/execution/kv_cache.py.
#include "execution/cache_state.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "execution/checks.hpp"
#include "execution/decisions.hpp"

namespace dynexport {
namespace {

std::int64_t checked_rows(const Manifest& manifest, std::int64_t rows) {
  checked_count("rows", rows);
  const auto& limit = manifest.limits.rows;
  if (limit && rows > *limit)
    throw Error("batch: expected at most " + std::to_string(*limit) +
                " rows, the limit of the bundle's engines, found " + std::to_string(rows) +
                "; convert it again with --max-batch " + std::to_string(rows));
  return rows;
}

}  // namespace

KvCache::State::State(std::shared_ptr<const Bundle> of, std::shared_ptr<Backend> on, std::int64_t row_count,
                      std::int64_t capacity, bool record, std::optional<std::int64_t> room)
    : bundle(std::move(of)),
      backend(std::move(on)),
      rows(checked_rows(manifest(), row_count)),
      tokens(std::min(checked_count("slots", capacity), manifest().model.max_length)),
      memory(manifest(), backend, rows, tokens, room),
      counts(memory.places(), rows, DecisionReader(manifest()).overflows()),
      texts(rows),
      free(static_cast<std::size_t>(rows), true) {
  if (record) logs.emplace(static_cast<std::size_t>(rows));
}

void KvCache::State::check(std::int64_t row) const {
  checked_count("row", row, 0, rows - 1);
  if (is_free(row)) throw Error("cache: row " + std::to_string(row) + ": expected one that is acquired, found it free");
}

void KvCache::State::check_room(std::int64_t row, std::int64_t count, bool is_prompt) const {
  const std::int64_t room = tokens - counts.position(row);
  if (count <= room) return;
  if (!is_prompt && room == 0)
    throw Error("cache: all " + std::to_string(tokens) + " slots of a row are used; the context is exhausted");
  throw Error(std::string(is_prompt ? "prompt" : "tokens") + ": expected at most " + std::to_string(room) +
              " tokens to fit the context of " + std::to_string(tokens) + ", found " + std::to_string(count));
}

void KvCache::State::check_entries(std::int64_t place, std::int64_t entries) const {
  if (entries > memory.slots(place))
    throw Error("cache: expected at most " + std::to_string(memory.slots(place)) + " entries of a row, found " +
                std::to_string(entries) + "; the context is exhausted");
}

std::int64_t KvCache::State::room(std::int64_t row) const {
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t place = 0; place < counts.places(); ++place)
    least = std::min(least, memory.slots(place) - counts.length(place, row));
  return least;
}

void KvCache::State::reserve(std::int64_t count) {
  const auto used = [this](std::int64_t place, std::int64_t row) { return counts.length(place, row); };
  if (!memory.reserve(count, used)) return;
  bindings.clear();
  step = LatestStep();
}

Caches KvCache::State::caches(std::int64_t first, std::int64_t count, std::optional<std::int64_t> place) const {
  return Caches{memory.buffers(), first, count, place};
}

Mark KvCache::State::mark(std::int64_t row) const {
  Mark mark = counts.at(row);
  mark.tenant = texts.tenant(row);
  mark.made = texts.truncations();
  mark.steps = logs ? (*logs)[static_cast<std::size_t>(row)].size() : 0;
  return mark;
}

void KvCache::State::restore(const Mark& mark) {
  counts.set(mark.row, mark);
  if (!logs) return;
  std::vector<Decisions>& log = (*logs)[static_cast<std::size_t>(mark.row)];
  if (mark.steps < log.size()) log.erase(log.begin() + static_cast<std::ptrdiff_t>(mark.steps), log.end());
}

void KvCache::State::commit(std::int64_t first, const std::vector<std::int64_t>& counted,
                            const std::vector<std::int64_t>& entries, const std::vector<Decisions>& decisions) {
  const auto size = static_cast<std::int64_t>(counted.size());
  for (std::int64_t i = 0; i < size; ++i) {
    const auto place = static_cast<std::size_t>(i);
    counts.add(first + i, counted[place], entries.data() + i, size);
    if (counted[place] == 0 || decisions.empty()) continue;
    counts.add_overflow(first + i, decisions[place].overflow);
    if (logs) (*logs)[static_cast<std::size_t>(first + i)].push_back(decisions[place]);
  }
}

AsItWas::AsItWas(KvCache::State& cache, const std::vector<std::int64_t>& rows) : cache_(cache) {
  for (const std::int64_t row : rows) before_.push_back(cache.mark(row));
}

AsItWas::~AsItWas() {
  for (const Mark& mark : before_) cache_.restore(mark);
}

}  // namespace dynexport
