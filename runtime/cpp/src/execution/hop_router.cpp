// Runs the router of a hop.
#include "execution/hop_router.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "execution/decisions.hpp"

namespace dynexport {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::int64_t count_of(const Indices& values) { return static_cast<std::int64_t>(values.size()); }

// The choices that a hop's router may make for each token, [n, choices]; tokens without any are removed.
std::vector<std::uint8_t> allowed_for(const Walk& walk, const PathRouting& routing, std::int64_t layers,
                                      std::int64_t hop, Indices& tokens) {
  std::vector<std::uint8_t> all;
  Indices kept;
  for (const std::int64_t token : tokens) {
    std::vector<std::uint8_t> allowed;
    for (std::int64_t layer = 0; layer < layers; ++layer)
      allowed.push_back(routing.reuse || !walk.visited[at(token * layers + layer)] ? 1 : 0);
    if (routing.exit) allowed.push_back(hop >= routing.min_hops ? 1 : 0);
    if (std::find(allowed.begin(), allowed.end(), 1) == allowed.end()) continue;
    kept.push_back(token);
    all.insert(all.end(), allowed.begin(), allowed.end());
  }
  tokens = std::move(kept);
  return all;
}

// The tokens that have not exited; they have until they are found to stay.
Indices taken_out(Walk& walk) {
  Indices tokens;
  for (std::int64_t token = 0; token < walk.tokens; ++token)
    if (walk.alive[at(token)]) tokens.push_back(token);
  std::fill(walk.alive.begin(), walk.alive.end(), false);
  return tokens;
}

void check_choice(const Graph& graph, const float* scores, std::int64_t choices, std::int64_t choice, const Walk& walk,
                  std::int64_t hop, std::int64_t token) {
  if (!std::all_of(scores, scores + choices, [](float score) { return std::isfinite(score); }))
    refuse_nan_in_hop(hop, walk.rows[at(token)], walk.positions[at(token)]);
  if (choice < 0 || choice >= choices)
    throw Error(graph.file + ": expected choices 0.." + std::to_string(choices - 1) + ", found " +
                std::to_string(choice));
}

// The gates of those tokens that stay; none if the router has none.
Array gates_of(Binding& binding, const Graph& graph, std::int64_t n, const Indices& stay) {
  if (!binding.has_result("probabilities")) return {};
  const Tensor found = binding.result("probabilities");
  Array gates{found.type, {n, 1}, std::vector<std::uint8_t>(at(n) * size_of(found.type))};
  scatter(found, counted_to(n), gates, graph.file + ": probabilities");
  return gathered(gates, stay, {count_of(stay), 1});
}

}  // namespace

Chosen choose(Bindings& bindings, const std::shared_ptr<Engine>& router, const PathRouting& routing,
              std::int64_t layers, std::int64_t hop, Walk& walk) {
  Indices tokens = taken_out(walk);
  const std::vector<std::uint8_t> allowed = allowed_for(walk, routing, layers, hop, tokens);
  if (tokens.empty()) return {};
  const std::int64_t n = count_of(tokens), choices = layers + (routing.exit ? 1 : 0);
  Indices forced;
  for (const std::int64_t token : tokens) forced.push_back(walk.forced[at(hop * walk.tokens + token)]);
  const Graph& graph = router->graph();
  const Arrays inputs{{"hidden_states", gathered(walk.hidden_states, tokens, {1, n, width_of(walk.hidden_states)})},
                      {"allowed", Array::of_bools({n, choices}, allowed)},
                      {"forced_choices", Array::of_longs({n}, forced)}};
  Binding& binding = run_engine(bindings, router, inputs, {});
  const auto* chose = result_of(binding, graph, "choices", Type::kInt64, {n}).as<std::int64_t>();
  const auto* scores = result_of(binding, graph, "scores", Type::kFloat, {n, choices}).as<float>();
  const auto* margins = result_of(binding, graph, "margins", Type::kFloat, {n}).as<float>();
  Indices stay;
  Chosen chosen;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t token = tokens[at(i)], choice = chose[i];
    check_choice(graph, scores + i * choices, choices, choice, walk, hop, token);
    const std::size_t place = at(hop * walk.tokens + token);
    walk.path[place] = choice;
    walk.margins[place] = margins[i];
    walk.scores[place] = scores[i * choices + choice];
    if (choice == layers) continue;
    walk.alive[at(token)] = true;
    walk.visited[at(token * layers + choice)] = true;
    stay.push_back(i);
    chosen.tokens.push_back(token);
    chosen.layers.push_back(choice);
  }
  chosen.gates = gates_of(binding, graph, n, stay);
  return chosen;
}

}  // namespace dynexport
