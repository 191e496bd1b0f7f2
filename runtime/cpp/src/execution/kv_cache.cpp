// The KV caches of a batch's rows: rows that are acquired, copied, cut back and released.
#include "dynexport/kv_cache.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"
#include "execution/checks.hpp"

namespace dynexport {
namespace {

std::string row_text(std::int64_t row) { return "cache: row " + std::to_string(row) + ": "; }

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

// Throws Error if a prefix's entries depend on the tokens after it.
void check_causal(const KvCache::State& cache) {
  if (cache.manifest().limits.whole_prompts)
    throw Error(
        "cache: expected a prefix that does not depend on the tokens after it, found a prompt that is routed as a "
        "whole "
        "(top-k, or a decision about a sequence); run the prompt again");
}

// Throws Error for counts that no row of this cache can have.
void check_lengths(const KvCache::State& cache, const std::vector<std::int64_t>& lengths, const char* what) {
  bool fit = lengths.size() == at(cache.counts.places());
  for (std::size_t place = 0; fit && place < lengths.size(); ++place)
    fit = lengths[place] >= 0 && lengths[place] <= cache.memory.slots(static_cast<std::int64_t>(place));
  if (!fit) throw Error(std::string(what) + ", found " + listed(lengths));
}

// Throws Error for a mark that is no longer valid.
void check_mark(const KvCache::State& cache, const Mark& mark) {
  cache.check(mark.row);
  cache.texts.check(mark, cache.counts.position(mark.row));
  check_lengths(cache, mark.lengths, "mark: expected one of KvCache::mark");
  if (mark.overflow.size() != at(cache.counts.counters()) || mark.position < 0 || mark.position > cache.tokens)
    throw Error("mark: expected one of KvCache::mark, found another");
}

void forget(KvCache::State& cache, std::int64_t row) {
  cache.texts.renew(row);
  cache.counts.clear(row);
  if (cache.logs) (*cache.logs)[at(row)].clear();
}

void copy(KvCache::State& cache, const Mark& mark, std::int64_t target) {
  cache.memory.copy_row(mark.row, target, mark.lengths);
  cache.counts.set(target, mark);
  if (!cache.logs || mark.row == target) return;
  const std::vector<Decisions>& log = (*cache.logs)[at(mark.row)];
  const auto steps = static_cast<std::ptrdiff_t>(std::min(mark.steps, log.size()));
  (*cache.logs)[at(target)] = std::vector<Decisions>(log.begin(), log.begin() + steps);
}

}  // namespace

std::size_t Saved::bytes() const {
  std::size_t sum = 0;
  for (const auto& [name, values] : entries) sum += values.size();
  return sum;
}

KvCache::KvCache(std::shared_ptr<const Bundle> bundle, std::shared_ptr<Backend> backend, std::int64_t rows,
                 std::int64_t tokens, bool record, std::optional<std::int64_t> room)
    : state_(std::make_unique<State>(std::move(bundle), std::move(backend), rows, tokens, record, room)) {}

KvCache::~KvCache() = default;

std::int64_t KvCache::rows() const { return state_->rows; }

std::int64_t KvCache::tokens() const { return state_->tokens; }

std::int64_t KvCache::length(std::int64_t place, std::int64_t row) const {
  return state_->counts.length(checked_count("place", place, 0, state_->counts.places() - 1),
                               checked_count("row", row, 0, state_->rows - 1));
}

std::int64_t KvCache::position(std::int64_t row) const {
  return state_->counts.position(checked_count("row", row, 0, state_->rows - 1));
}

std::int64_t KvCache::overflow(std::int64_t counter, std::int64_t row) const {
  return state_->counts.overflow(checked_count("counter", counter, 0, state_->counts.counters() - 1),
                                 checked_count("row", row, 0, state_->rows - 1));
}

std::vector<std::int64_t> KvCache::lengths(std::int64_t row) const {
  return state_->counts.lengths(checked_count("row", row, 0, state_->rows - 1));
}

const std::vector<Decisions>& KvCache::log(std::int64_t row) const {
  static const std::vector<Decisions> kNone;
  checked_count("row", row, 0, state_->rows - 1);
  return state_->logs ? (*state_->logs)[at(row)] : kNone;
}

bool KvCache::records() const { return state_->logs.has_value(); }

std::vector<std::int64_t> KvCache::free_rows() const {
  std::vector<std::int64_t> found;
  for (std::int64_t row = 0; row < state_->rows; ++row)
    if (state_->is_free(row)) found.push_back(row);
  return found;
}

std::vector<std::int64_t> KvCache::acquire(std::int64_t count) {
  checked_count("rows", count);
  std::vector<std::int64_t> found = free_rows();
  if (count > static_cast<std::int64_t>(found.size()))
    throw Error("cache: expected " + std::to_string(count) + " free of " + std::to_string(rows()) + " rows, found " +
                std::to_string(found.size()) + "; release one, or make a cache of more rows");
  found.resize(at(count));
  for (const std::int64_t row : found) state_->free[at(row)] = false;
  return found;
}

void KvCache::release(std::int64_t row) {
  state_->check(row);
  forget(*state_, row);
  state_->free[at(row)] = true;
}

void KvCache::rewind(std::int64_t row) {
  state_->check(row);
  forget(*state_, row);
}

Mark KvCache::mark(std::int64_t row) const {
  state_->check(row);
  return state_->mark(row);
}

void KvCache::truncate(std::int64_t row, const Mark& mark) {
  state_->check(row);
  check_mark(*state_, mark);
  if (mark.row != row)
    throw Error(row_text(row) + "expected a mark of its own, found one of row " + std::to_string(mark.row));
  state_->restore(mark);
  state_->texts.truncate(row, mark.position);
}

void KvCache::copy_prefix(const Mark& mark, std::int64_t target) {
  check_causal(*state_);
  check_mark(*state_, mark);
  state_->check(target);
  if (position(target) != 0)
    throw Error(row_text(target) + "expected an empty row to copy to, found " + std::to_string(position(target)) +
                " tokens");
  copy(*state_, mark, target);
}

Saved KvCache::save(std::int64_t row, const std::vector<std::int64_t>& lengths, std::int64_t position) const {
  state_->check(row);
  check_causal(*state_);
  const std::vector<std::int64_t> last = state_->counts.lengths(row);
  check_lengths(*state_, lengths, "save: expected a number of entries of every place");
  Saved saved;
  saved.lengths = lengths;
  for (std::size_t place = 0; place < last.size(); ++place)
    saved.added.push_back(checked_count("save: entries", last[place] - lengths[place], 0));
  saved.first = checked_count("save: position", position, 0, state_->counts.position(row));
  saved.last = state_->counts.position(row);
  saved.entries = state_->memory.read(row, lengths, last);
  return saved;
}

void KvCache::restore(std::int64_t row, const Saved& saved) {
  state_->check(row);
  if (position(row) != saved.first || lengths(row) != saved.lengths)
    throw Error(row_text(row) + "expected a row of " + std::to_string(saved.first) +
                " tokens to append saved entries to, found " + std::to_string(position(row)) + " tokens");
  const std::int64_t count = checked_count("saved: tokens", saved.last, saved.first) - saved.first;
  state_->check_room(row, count, true);
  state_->reserve(saved.last);
  check_lengths(*state_, saved.added, "saved: expected entries of every place");
  state_->memory.write(row, saved.lengths, saved.added, saved.entries);
  state_->counts.add(row, count, saved.added.data(), 1);
}

void KvCache::move(std::int64_t row, std::int64_t target) {
  state_->check(row);
  checked_count("row", target, 0, rows() - 1);
  if (!state_->is_free(target)) throw Error(row_text(target) + "expected a free row to move to, found it acquired");
  copy(*state_, state_->mark(row), target);
  state_->free[at(target)] = false;
  release(row);
}

KvCache::State& KvCache::state() { return *state_; }

}  // namespace dynexport
