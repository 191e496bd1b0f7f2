// Runs a set of graphs hop by hop, as Python's runtime/execution/graph_set.py.
#include "execution/graph_set.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"
#include "execution/hop_router.hpp"
#include "execution/lines.hpp"

namespace dynexport {
namespace {

using Longs = std::vector<std::int64_t>;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::int64_t size_of(const Longs& values) { return static_cast<std::int64_t>(values.size()); }

}  // namespace

RunningSet::RunningSet(const Manifest& manifest, const GraphSet& names, const SetEngines& engines)
    : routing_(std::get<PathRouting>(manifest.routing)),
      reader_(manifest),
      layers_(manifest.model.layers),
      vocabulary_(manifest.model.vocab_size),
      embedding_(engines.at(names.embedding)),
      attention_(engines.at(names.attention)),
      head_(engines.at(names.head)) {
  for (const std::string& name : names.routers) routers_.push_back(engines.at(name));
  for (const std::string& name : names.before_attention) before_.push_back(engines.at(name));
  for (const std::string& name : names.after_attention) after_.push_back(engines.at(name));
  for (const std::string& name : names.layers) whole_.push_back(engines.at(name));
}

CallResult RunningSet::run(KvCache::State& cache, const Call& call) {
  Walk walk = begin(cache, call);
  for (std::int64_t hop = 0; hop < routing_.hops; ++hop) {
    const Chosen chosen = choose(cache.bindings, routers_[at(hop)], routing_, layers_, hop, walk);
    if (!chosen.tokens.empty()) run_hop(cache, walk, hop, chosen);
    if (std::none_of(walk.alive.begin(), walk.alive.end(), [](bool alive) { return alive; })) break;
  }
  CallResult result;
  for (std::size_t i = 0; i < walk.lengths.size(); ++i) result.entries.push_back(walk.lengths[i] - walk.before[i]);
  result.own = wanted_logits(cache, walk, call);
  result.logits = result.own.data();
  result.places = call.asked;
  result.decisions = decisions(walk, call);
  return result;
}

Walk RunningSet::begin(KvCache::State& cache, const Call& call) const {
  Walk walk;
  walk.first = call.first;
  walk.rows_of_call = call.rows;
  Longs ids;
  for (std::int64_t row = 0; row < call.rows; ++row) {
    walk.one_each = walk.one_each && call.counts[at(row)] == 1;
    for (std::int64_t token = 0; token < call.counts[at(row)]; ++token) {
      ids.push_back(call.ids[at(row * call.tokens + token)]);
      walk.rows.push_back(call.first + row);
      walk.positions.push_back(cache.counts.position(call.first + row) + token);
    }
  }
  walk.tokens = size_of(ids);
  for (std::int64_t hop = 0; hop < routing_.hops; ++hop)
    for (std::int64_t row = 0; row < call.rows; ++row) {
      const auto start = call.forced.begin() + (hop * call.rows + row) * call.tokens;
      walk.forced.insert(walk.forced.end(), start, start + call.counts[at(row)]);
    }
  for (std::int64_t place = 0; place < cache.counts.places(); ++place)
    for (std::int64_t row = 0; row < call.rows; ++row)
      walk.before.push_back(cache.counts.length(place, call.first + row));
  walk.lengths = walk.before;
  const std::size_t all = at(routing_.hops * walk.tokens);
  walk.alive.assign(at(walk.tokens), true);
  walk.visited.assign(at(walk.tokens * layers_), false);
  walk.path.assign(all, -1);
  walk.scores.assign(all, 0);
  walk.margins.assign(all, std::numeric_limits<float>::infinity());
  embed(cache, walk, ids);
  return walk;
}

// Computes the tokens' hidden states and rotary angles.
void RunningSet::embed(KvCache::State& cache, Walk& walk, const Longs& ids) const {
  const Arrays inputs{{"input_ids", Array::of_longs({1, walk.tokens}, ids)},
                      {"position_ids", Array::of_longs({1, walk.tokens}, walk.positions)}};
  Binding& binding = run_engine(cache.bindings, embedding_, inputs, {});
  const Longs every = counted_to(walk.tokens);
  for (const TensorSpec& spec : embedding_->graph().outputs) {
    const Tensor found = binding.result(spec.name);
    Array lines = lines_like(found, walk.tokens);
    scatter(found, every, lines, embedding_->graph().file + ": " + spec.name);
    (spec.name == "hidden_states_out" ? walk.hidden_states : walk.angles[spec.name]) = std::move(lines);
  }
  if (walk.hidden_states.bytes.empty())
    throw Error(embedding_->graph().file + ": expected an output hidden_states_out, found none; convert again");
}

// Runs each token's layer and replaces its hidden state by the layer's output.
void RunningSet::run_hop(KvCache::State& cache, Walk& walk, std::int64_t hop, const Chosen& chosen) const {
  const Groups groups = grouped(chosen.layers);
  if (!whole_.empty() && groups.size() == 1 && walk.one_each && chosen.tokens.size() == walk.rows.size())
    return run_layer(cache, walk, hop, groups.front().first, chosen);
  const Arrays parts = prepared(cache, walk, chosen.tokens, groups);
  finish(cache, walk, chosen, groups, attended(cache, walk, hop, chosen.tokens, groups, parts));
}

// Runs a whole layer on all rows, which have one token each.
void RunningSet::run_layer(KvCache::State& cache, Walk& walk, std::int64_t hop, std::int64_t layer,
                           const Chosen& chosen) const {
  const std::int64_t n = walk.tokens;
  const Longs every = counted_to(n);
  Arrays inputs{{"hidden_states", gathered(walk.hidden_states, every, {n, 1, width_of(walk.hidden_states)})},
                {"position_ids", Array::of_longs({n, 1}, walk.positions)}};
  for (const auto& [name, part] : walk.angles) inputs[name] = gathered(part, every, {n, 1, width_of(part)});
  if (!chosen.gates.bytes.empty()) inputs["gates"] = gathered(chosen.gates, every, {n});
  const std::shared_ptr<Engine>& engine = whole_[at(layer)];
  const std::int64_t place = routing_.places_are_layers ? layer : hop;
  Binding& binding = appended(engine, cache, walk, place, hop, walk.first, std::move(inputs));
  Tensor found = binding.result("hidden_states_out");
  if (found.shape.size() == 3) std::swap(found.shape[0], found.shape[1]);  // rows of one token as a line
  scatter(found, every, walk.hidden_states, engine->graph().file + ": hidden_states_out");
}

// Runs each token's layer up to attention: query, key and value [n, ..], and position_ids [n, 1].
Arrays RunningSet::prepared(KvCache::State& cache, const Walk& walk, const Indices& tokens,
                            const Groups& groups) const {
  Arrays made;
  for (const auto& [layer, group] : groups) {
    const Indices mine = chosen_of(tokens, group);
    Arrays inputs{
        {"hidden_states", gathered(walk.hidden_states, mine, {1, size_of(mine), width_of(walk.hidden_states)})}};
    for (const auto& [name, part] : walk.angles)
      inputs[name] = gathered(part, mine, {1, size_of(mine), width_of(part)});
    const std::shared_ptr<Engine>& engine = before_[at(layer)];
    Binding& binding = run_engine(cache.bindings, engine, inputs, {});
    for (const TensorSpec& spec : engine->graph().outputs) {
      const Tensor found = binding.result(spec.name);
      if (made.count(spec.name) == 0) made[spec.name] = lines_like(found, size_of(tokens));
      scatter(found, group, made[spec.name], engine->graph().file + ": " + spec.name);
    }
  }
  made["position_ids"] = Array::of_longs({size_of(tokens), 1}, chosen_of(walk.positions, tokens));
  return made;
}

// Attention of all tokens of a hop, [n, ..]. Each call reads one cache: the hop's, or a layer's.
Array RunningSet::attended(KvCache::State& cache, Walk& walk, std::int64_t hop, const Indices& tokens,
                           const Groups& groups, const Arrays& prepared) const {
  const auto query = prepared.find("query");
  if (query == prepared.end()) throw Error("expected an output query before attention, found none; convert again");
  Array made = query->second;
  const Groups whole{{hop, counted_to(size_of(tokens))}};
  for (const auto& [place, group] : routing_.places_are_layers ? groups : whole) {
    // One call runs all rows where each has one token; else each row has a call of its own.
    const bool at_once = walk.one_each && group.size() == walk.rows.size();
    const Groups by_row = at_once ? Groups{{walk.first, counted_to(size_of(group))}}
                                  : grouped(chosen_of(walk.rows, chosen_of(tokens, group)));
    for (const auto& [row, inside] : by_row) {
      const Indices index = chosen_of(group, inside);
      const std::int64_t rows = at_once ? size_of(index) : 1, count = at_once ? 1 : size_of(index);
      Arrays inputs;
      for (const auto& [name, part] : prepared) inputs[name] = gathered(part, index, {rows, count, width_of(part)});
      inputs["position_ids"].shape = {rows, count};
      const Array found = attend(cache, walk, place, hop, row, std::move(inputs));
      scatter({found.type, found.shape, const_cast<std::uint8_t*>(found.bytes.data())}, index, made,
              attention_->graph().file + ": attention");
    }
  }
  return made;
}

// Attention [b, C, ..] of C tokens per row from row ``first`` on, over the cache of one place, which it extends.
Array RunningSet::attend(KvCache::State& cache, Walk& walk, std::int64_t place, std::int64_t hop, std::int64_t first,
                         Arrays inputs) const {
  Binding& binding = appended(attention_, cache, walk, place, hop, first, std::move(inputs));
  const Tensor found = binding.result("attention");
  return Array{found.type, found.shape,
               std::vector<std::uint8_t>(found.as<std::uint8_t>(), found.as<std::uint8_t>() + found.bytes())};
}

// Runs a graph that appends C tokens per row, position_ids [b, C], to the cache of one place.
Binding& RunningSet::appended(const std::shared_ptr<Engine>& engine, KvCache::State& cache, Walk& walk,
                              std::int64_t place, std::int64_t hop, std::int64_t first, Arrays inputs) const {
  const std::int64_t rows = inputs["position_ids"].shape[0], count = inputs["position_ids"].shape[1];
  std::int64_t* mine = walk.lengths.data() + place * walk.rows_of_call + (first - walk.first);
  const Longs lengths(mine, mine + rows);
  const std::int64_t total = *std::max_element(lengths.begin(), lengths.end()) + count;
  cache.check_entries(place, total);
  std::vector<std::int32_t> last;
  for (const std::int64_t length : lengths) last.push_back(static_cast<std::int32_t>(length + count - 1));
  inputs["cache_lengths"] = Array::of_longs({rows}, lengths);
  inputs["last_index"] = Array::of(Type::kInt32, {rows}, last);
  inputs["total_length"] = Array::of(Type::kInt32, {}, std::vector<std::int32_t>{static_cast<std::int32_t>(total)});
  inputs["step"] = Array::of_longs({}, {hop});
  Binding& binding = run_engine(cache.bindings, engine, inputs, cache.caches(first, rows, place));
  for (std::int64_t row = 0; row < rows; ++row) mine[row] += count;
  return binding;
}

// Runs the rest of each token's layer.
void RunningSet::finish(KvCache::State& cache, Walk& walk, const Chosen& chosen, const Groups& groups,
                        const Array& attended) const {
  for (const auto& [layer, group] : groups) {
    const Indices mine = chosen_of(chosen.tokens, group);
    const std::int64_t n = size_of(mine);
    Arrays inputs{{"hidden_states", gathered(walk.hidden_states, mine, {1, n, width_of(walk.hidden_states)})},
                  {"attention", gathered(attended, group, {1, n, width_of(attended)})}};
    if (!chosen.gates.bytes.empty()) inputs["gates"] = gathered(chosen.gates, group, {n});
    const std::shared_ptr<Engine>& engine = after_[at(layer)];
    Binding& binding = run_engine(cache.bindings, engine, inputs, {});
    scatter(binding.result("hidden_states_out"), mine, walk.hidden_states,
            engine->graph().file + ": hidden_states_out");
  }
}

// The logits that the call asks for, [B, K, vocab]; zeros for rows without tokens.
std::vector<float> RunningSet::wanted_logits(KvCache::State& cache, const Walk& walk, const Call& call) const {
  Longs tokens, targets;
  std::int64_t first = 0;
  for (std::int64_t row = 0; row < call.rows; ++row) {
    for (std::int64_t i = 0; i < call.asked && call.counts[at(row)] > 0; ++i) {
      tokens.push_back(first + call.wanted[at(row * call.asked + i)]);
      targets.push_back(row * call.asked + i);
    }
    first += call.counts[at(row)];
  }
  std::vector<float> all(at(call.rows * call.asked * vocabulary_));
  if (tokens.empty()) return all;
  const std::int64_t most = head_->graph().limit("N").value_or(size_of(tokens));
  for (std::int64_t start = 0; start < size_of(tokens); start += most) {
    const std::int64_t n = std::min(most, size_of(tokens) - start);
    const Longs mine(tokens.begin() + start, tokens.begin() + start + n);
    const std::vector<float> found =
        logits(cache, gathered(walk.hidden_states, mine, {1, n, width_of(walk.hidden_states)}));
    for (std::int64_t i = 0; i < n; ++i)
      std::copy_n(found.begin() + i * vocabulary_, vocabulary_, all.begin() + targets[at(start + i)] * vocabulary_);
  }
  return all;
}

// The logits of hidden states [1, n, hidden].
std::vector<float> RunningSet::logits(KvCache::State& cache, const Array& hidden_states) const {
  Binding& binding = run_engine(cache.bindings, head_, {{"hidden_states", hidden_states}}, {});
  const Tensor found =
      result_of(binding, head_->graph(), "logits", Type::kFloat, {1, hidden_states.shape[1], vocabulary_});
  return {found.as<float>(), found.as<float>() + found.elements()};
}

std::vector<Decisions> RunningSet::decisions(const Walk& walk, const Call& call) const {
  std::vector<Decisions> made;
  std::int64_t first = 0;
  for (const std::int64_t count : call.counts) {
    made.push_back(reader_.of_row(walk.path.data() + first, walk.scores.data() + first, walk.margins.data() + first,
                                  walk.tokens, count, call.active));
    first += count;
  }
  return made;
}

}  // namespace dynexport
