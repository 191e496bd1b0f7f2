// Runs a set of graphs hop by hop, as Python's runtime/execution/graph_set.py.
#include "execution/graph_set.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"
#include "execution/lines.hpp"

namespace dynexport {
namespace {

using Longs = std::vector<std::int64_t>;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::int64_t size_of(const Longs& values) { return static_cast<std::int64_t>(values.size()); }

// The elements of ``values`` at some indices.
Longs chosen_of(const Longs& values, const Longs& indices) {
  Longs found;
  found.reserve(indices.size());
  for (const std::int64_t index : indices) found.push_back(values[at(index)]);
  return found;
}

Longs counted_to(std::int64_t count) {
  Longs found(at(count));
  std::iota(found.begin(), found.end(), 0);
  return found;
}

// Every value with the indices where it stands, ascending.
std::vector<std::pair<std::int64_t, Longs>> grouped(const Longs& values) {
  std::map<std::int64_t, Longs> groups;
  for (std::int64_t i = 0; i < size_of(values); ++i) groups[values[at(i)]].push_back(i);
  return {groups.begin(), groups.end()};
}

}  // namespace

// The state of one call: its N tokens, concatenated row by row in the order of their positions.
struct RunningSet::Walk {
  std::int64_t first = 0, rows_of_call = 0, tokens = 0;
  Longs rows, positions;       // [N], each token's row in the cache and position
  Array hidden_states;         // [N, hidden]
  Arrays angles;               // with rotary positions "cos" and "sin" [N, ..]
  Longs forced;                // [hops, N], -1 where the router decides
  Longs before, lengths;       // [places, B], entries before the call and now
  bool one_each = true;        // whether every row of the call has exactly one token
  std::vector<bool> alive;     // [N], until the token exits
  std::vector<bool> visited;   // [N, layers], layers that the token ran
  Longs path;                  // [hops, N], the layer; the number of layers for an exit, -1 after it
  std::vector<float> scores;   // [hops, N], of each choice; 0 after the exit
  std::vector<float> margins;  // [hops, N], the distance to the next best choice; infinity after the exit
};

// The tokens that run a layer in a hop, their layers and their gates.
struct RunningSet::Chosen {
  Indices tokens, layers;
  Array gates;  // [n, 1]; no elements if the router has none
};

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
}

CallResult RunningSet::run(KvCache::State& cache, const Call& call) {
  Walk walk = begin(cache, call);
  for (std::int64_t hop = 0; hop < routing_.hops; ++hop) {
    const Chosen chosen = choose(cache, walk, hop);
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

RunningSet::Walk RunningSet::begin(KvCache::State& cache, const Call& call) const {
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
  return walk;
}

// The choices that a hop's router may make for each token, [n, choices]; tokens without any are removed and have
// exited.
std::vector<std::uint8_t> RunningSet::allowed_for(const Walk& walk, std::int64_t hop, Indices& tokens) const {
  const bool may_exit = routing_.exit && hop >= routing_.min_hops;
  std::vector<std::uint8_t> all;
  Indices kept;
  for (const std::int64_t token : tokens) {
    std::vector<std::uint8_t> allowed;
    for (std::int64_t layer = 0; layer < layers_; ++layer)
      allowed.push_back(routing_.reuse || !walk.visited[at(token * layers_ + layer)] ? 1 : 0);
    if (routing_.exit) allowed.push_back(may_exit ? 1 : 0);
    if (std::find(allowed.begin(), allowed.end(), 1) == allowed.end()) continue;
    kept.push_back(token);
    all.insert(all.end(), allowed.begin(), allowed.end());
  }
  tokens = std::move(kept);
  return all;
}

// Runs the hop's router.
RunningSet::Chosen RunningSet::choose(KvCache::State& cache, Walk& walk, std::int64_t hop) const {
  Indices tokens;
  for (std::int64_t token = 0; token < walk.tokens; ++token)
    if (walk.alive[at(token)]) tokens.push_back(token);
  const std::vector<std::uint8_t> allowed = allowed_for(walk, hop, tokens);
  std::fill(walk.alive.begin(), walk.alive.end(), false);
  if (tokens.empty()) return {};
  const std::int64_t n = size_of(tokens), choices = layers_ + (routing_.exit ? 1 : 0);
  Longs forced;
  for (const std::int64_t token : tokens) forced.push_back(walk.forced[at(hop * walk.tokens + token)]);
  const std::shared_ptr<Engine>& router = routers_[at(hop)];
  const Graph& graph = router->graph();
  const Arrays inputs{{"hidden_states", gathered(walk.hidden_states, tokens, {1, n, width_of(walk.hidden_states)})},
                      {"allowed", Array::of_bools({n, choices}, allowed)},
                      {"forced_choices", Array::of_longs({n}, forced)}};
  Binding& binding = run_engine(cache.bindings, router, inputs, {});
  const auto* chose = result_of(binding, graph, "choices", Type::kInt64, {n}).as<std::int64_t>();
  const auto* scores = result_of(binding, graph, "scores", Type::kFloat, {n, choices}).as<float>();
  const auto* margins = result_of(binding, graph, "margins", Type::kFloat, {n}).as<float>();
  Indices stay;
  Chosen chosen;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t token = tokens[at(i)], choice = chose[i];
    if (!std::all_of(scores + i * choices, scores + (i + 1) * choices,
                     [](float score) { return std::isfinite(score); }))
      refuse_nan_in_hop(hop, walk.rows[at(token)], walk.positions[at(token)]);
    if (choice < 0 || choice >= choices)
      throw Error(graph.file + ": expected choices 0.." + std::to_string(choices - 1) + ", found " +
                  std::to_string(choice));
    const std::size_t place = at(hop * walk.tokens + token);
    walk.path[place] = choice;
    walk.margins[place] = margins[i];
    walk.scores[place] = scores[i * choices + choice];
    if (choice == layers_) continue;
    walk.alive[at(token)] = true;
    walk.visited[at(token * layers_ + choice)] = true;
    stay.push_back(i);
    chosen.tokens.push_back(token);
    chosen.layers.push_back(choice);
  }
  if (!binding.has_result("probabilities")) return chosen;
  const Tensor found = binding.result("probabilities");
  Array gates{found.type, {n, 1}, std::vector<std::uint8_t>(at(n) * dynexport::size_of(found.type))};
  scatter(found, counted_to(n), gates, graph.file + ": probabilities");
  chosen.gates = gathered(gates, stay, {size_of(stay), 1});
  return chosen;
}

// Runs each token's layer and replaces its hidden state by the layer's output.
void RunningSet::run_hop(KvCache::State& cache, Walk& walk, std::int64_t hop, const Chosen& chosen) const {
  const Groups groups = grouped(chosen.layers);
  const Arrays parts = prepared(cache, walk, chosen.tokens, groups);
  finish(cache, walk, chosen, groups, attended(cache, walk, hop, chosen.tokens, groups, parts));
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
  Binding& binding = run_engine(cache.bindings, attention_, inputs, cache.caches(first, rows, place));
  for (std::int64_t row = 0; row < rows; ++row) mine[row] += count;
  const Tensor found = binding.result("attention");
  return Array{found.type, found.shape,
               std::vector<std::uint8_t>(found.as<std::uint8_t>(), found.as<std::uint8_t>() + found.bytes())};
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
