// Splits a batch into calls, as Python's runtime/execution/calls.py.
#include "execution/calls.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"

namespace dynexport {
namespace {

// Computing up to this many idle rows between two active ones costs less than a second call, which reads the weights
// once more.
constexpr std::int64_t kMostIdle = 2;
// Up to this many tokens a row, padding costs less than reading the weights once more for every row.
constexpr std::int64_t kShort = 65;
// Position at which a chunk of the same time has half as many tokens as at 0.
constexpr double kHalf = 1500;
// Kernels work on blocks of this many tokens.
constexpr std::int64_t kBlock = 8;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

}  // namespace

std::int64_t Chunks::size(std::int64_t position) const {
  if (!even) return first;
  const double tokens = static_cast<double>(first) / (1 + static_cast<double>(position) / kHalf);
  // Python rounds half to even, as nearbyint does.
  return std::min(first, std::max(kBlock, static_cast<std::int64_t>(std::nearbyint(tokens / kBlock)) * kBlock));
}

std::vector<std::int64_t> Slice::wanted() const {
  std::vector<std::int64_t> inside;
  for (const std::int64_t place : part->wanted)
    if (place >= part->done && place < part->done + count) inside.push_back(place - part->done);
  return inside;
}

Cutter::Cutter(const KvCache::State& cache, const Limits& limits, const Graph& graph, const Chunks& chunk)
    : cache_(cache), limits_(limits), chunk_(chunk), most_(chunk.first) {
  for (const auto& limit : {limits.prompt, graph.limit("S"), graph.limit("C")})
    if (limit && *limit > 0) most_ = std::min(most_, *limit);
  for (const TensorSpec& spec : graph.inputs) {
    if (spec.name != "input_ids") continue;
    pads_ = true;
    if (spec.shape.size() > 1 && spec.shape[1].symbol.empty() && spec.shape[1].size > 0)
      most_ = std::min(most_, spec.shape[1].size);  // a decode graph has a fixed size
  }
}

void Cutter::each(const Parts& parts, const Run& run) const {
  std::int64_t longest = 0;
  for (const Part* part : parts) longest = std::max(longest, part->left());
  if (longest == 1) {
    for (const Parts& side_by_side : ranges(parts, false)) {
      std::vector<Slice> pieces;
      for (Part* part : side_by_side) pieces.push_back({part, 1});
      run(pieces);
    }
    return;
  }
  const std::int64_t most = tokens_of_a_row(parts, longest);
  each_together(parts, longest, most, run);
  for (Part* part : parts)
    while (part->left() > 0) {
      const std::int64_t filled = is_empty(part->row) ? most : limits_.filled.value_or(most);
      run({{part, std::min(size(*part, most), filled)}});
    }
}

// Runs the parts of rows that share a call whatever their caches hold, chunk by chunk.
void Cutter::side_by_side(const Parts& parts, std::int64_t most, const Run& run) const {
  for (;;) {
    Parts rest;
    std::int64_t longest = 0;
    for (Part* part : parts) {
      if (part->left() == 0) continue;
      rest.push_back(part);
      longest = std::max(longest, size(*part, most));
    }
    if (rest.empty()) return;
    for (const Parts& group : pads_ ? ranges(rest, false, longest) : std::vector<Parts>{rest}) {
      std::vector<Slice> pieces;
      for (Part* part : group) pieces.push_back({part, size(*part, most)});
      run(pieces);
    }
  }
}

// Runs the parts whose rows may share a call of several tokens.
void Cutter::each_together(const Parts& parts, std::int64_t longest, std::int64_t most, const Run& run) const {
  if (limits_.together == Together::kAlways && (!pads_ || longest <= kShort)) {
    side_by_side(parts, most, run);
    return;
  }
  const bool whole =
      std::all_of(parts.begin(), parts.end(), [&](const Part* part) { return size(*part, most) == part->left(); });
  if (limits_.together == Together::kNever || !whole) return;
  Parts empty;
  std::copy_if(parts.begin(), parts.end(), std::back_inserter(empty),
               [&](const Part* part) { return is_empty(part->row); });
  for (const Parts& side_by_side : ranges(empty, true)) {
    if (side_by_side.size() < 2) continue;
    std::vector<Slice> pieces;
    for (Part* part : side_by_side) pieces.push_back({part, part->left()});
    run(pieces);
  }
}

// The tokens of a row's next chunk.
std::int64_t Cutter::size(const Part& part, std::int64_t most) const {
  if (chunk_.even && !limits_.whole_prompts) most = std::min(most, chunk_.size(cache_.counts.position(part.row)));
  return std::min(part.left(), most);
}

// The most tokens of each row in one call.
std::int64_t Cutter::tokens_of_a_row(const Parts& parts, std::int64_t longest) const {
  std::int64_t most = most_;
  const auto asks_more = [&](const Part* part) { return part->wanted.size() > at(*limits_.logits); };
  if (limits_.logits && std::any_of(parts.begin(), parts.end(), asks_more)) most = std::min(most, *limits_.logits);
  if (limits_.tokens)
    most = std::min(most, std::max<std::int64_t>(1, *limits_.tokens / static_cast<std::int64_t>(parts.size())));
  if (!limits_.whole_prompts) return most;
  if (limits_.prompt && longest > *limits_.prompt)
    throw Error("prompt: expected at most " + std::to_string(*limits_.prompt) +
                " tokens, the bundle's limit for a prompt that top-k routes as a whole, found " +
                std::to_string(longest) + "; convert it again with --max-prompt " + std::to_string(longest));
  return longest;
}

// Whether the rows first .. last - 1, which take no part, may be computed along.
bool Cutter::fits_between(std::int64_t first, std::int64_t last, bool all_idle, std::int64_t tokens) const {
  if (!all_idle && last - first > kMostIdle) return false;
  for (std::int64_t row = first; row < last; ++row)
    if (all_idle ? !is_empty(row) : cache_.room(row) < tokens) return false;
  return true;
}

// Splits rows, ascending, where too many idle rows lie between, or one whose entries the call would overwrite, which
// writes ``tokens`` for every row; ``all_idle`` accepts any number of empty rows.
std::vector<Cutter::Parts> Cutter::ranges(const Parts& parts, bool all_idle, std::int64_t tokens) const {
  const auto has_room = [&](const Part* part) { return tokens == 1 || cache_.room(part->row) >= tokens; };
  std::vector<Parts> found;
  for (Part* part : parts) {
    const Part* before = found.empty() ? nullptr : found.back().back();
    if (before == nullptr || !has_room(before) || !has_room(part) ||
        !fits_between(before->row + 1, part->row, all_idle, tokens))
      found.emplace_back();
    found.back().push_back(part);
  }
  return found;
}

bool Cutter::is_empty(std::int64_t row) const { return cache_.counts.position(row) == 0; }

Call call_of(const std::vector<Slice>& pieces, std::int64_t decisions, const std::vector<std::uint8_t>& active,
             bool is_prompt) {
  Call call;
  call.first = pieces.front().part->row;
  call.rows = pieces.back().part->row + 1 - call.first;
  call.active = active;
  call.is_prompt = is_prompt;
  for (const Slice& piece : pieces) {
    call.tokens = std::max(call.tokens, piece.count);
    call.asked = std::max(call.asked, static_cast<std::int64_t>(piece.wanted().size()));
  }
  call.ids.resize(at(call.rows * call.tokens));
  call.counts.resize(at(call.rows));
  call.wanted.resize(at(call.rows * call.asked));
  call.forced.assign(at(decisions * call.rows * call.tokens), -1);
  for (const Slice& piece : pieces) {
    const std::int64_t row = piece.part->row - call.first, done = piece.part->done;
    const auto all = static_cast<std::int64_t>(piece.part->ids.size());
    std::copy_n(piece.part->ids.begin() + done, piece.count, call.ids.begin() + row * call.tokens);
    for (std::int64_t place = 0; place < decisions; ++place)
      std::copy_n(piece.part->forced.begin() + place * all + done, piece.count,
                  call.forced.begin() + (place * call.rows + row) * call.tokens);
    call.counts[at(row)] = piece.count;
    const std::vector<std::int64_t> places = piece.wanted();
    for (std::int64_t i = 0; i < call.asked; ++i)  // all rows ask for as many, so places repeat
      call.wanted[at(row * call.asked + i)] = places.empty() ? piece.count - 1 : places[at(i) % places.size()];
  }
  return call;
}

}  // namespace dynexport
