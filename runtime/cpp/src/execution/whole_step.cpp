// Runs a graph that computes a whole step, as Python's runtime/execution/whole_step.py.
#include "execution/whole_step.hpp"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "engines/sizes.hpp"
#include "execution/cache_state.hpp"

namespace dynexport {
namespace {

using Longs = std::vector<std::int64_t>;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

Longs positions_of(const KvCache::State& cache, const Call& call) {
  Longs found;
  for (std::int64_t row = 0; row < call.rows; ++row) found.push_back(cache.counts.position(call.first + row));
  return found;
}

// [B, S]; only padding and rows without tokens can exceed the model's last position.
Longs position_ids(const Longs& positions, std::int64_t tokens, std::int64_t most) {
  Longs found;
  found.reserve(positions.size() * at(tokens));
  for (const std::int64_t position : positions)
    for (std::int64_t token = 0; token < tokens; ++token) found.push_back(std::min(position + token, most));
  return found;
}

void check_outputs(const Graph& graph, std::vector<std::string> wanted) {
  std::sort(wanted.begin(), wanted.end());
  for (const std::string& name : wanted)
    if (!graph.returns(name)) throw Error(graph.file + ": expected an output " + name + ", found none; convert again");
}

}  // namespace

WholeStep::WholeStep(const Manifest& manifest, std::shared_ptr<Engine> engine)
    : manifest_(manifest),
      engine_(std::move(engine)),
      reader_(manifest),
      places_(engine_->graph().places.value_or(Longs())) {
  const Graph& graph = engine_->graph();
  std::vector<std::string> wanted = reader_.outputs();
  wanted.emplace_back("logits");
  check_outputs(graph, wanted);
  std::set<std::string> found;
  for (const TensorSpec& spec : graph.inputs)
    if (is_cache_input(spec)) {
      const std::string name = spec.name.substr(kPast.size());
      found.insert(name.substr(0, name.find('.')));
    }
  const auto stored =
      static_cast<std::size_t>(std::count_if(places_.begin(), places_.end(), [&manifest](std::int64_t place) {
        return !manifest.caches.at(static_cast<std::size_t>(place)).parts.empty();
      }));
  if (found.size() != stored)
    throw Error(graph.file + ": expected " + std::to_string(stored) + " caches, found " + std::to_string(found.size()) +
                "; convert again");
}

CallResult WholeStep::run(KvCache::State& cache, const Call& call) {
  Binding& binding = run_engine(cache.bindings, engine_, inputs(cache, call), cache.caches(call.first, call.rows));
  const Tensor found = logits(binding, call);
  CallResult result;
  result.logits = found.as<float>();
  result.places = found.shape[1];
  if (reader_.rows() == 0) {
    result.entries = entries(call);
    if (cache.logs)
      for (const std::int64_t count : call.counts) result.decisions.push_back(reader_.unrouted(call.active, count));
    return result;
  }
  Read read =
      reader_.read(binding, graph(), {call.counts, positions_of(cache, call), call.active, call.first, call.tokens});
  result.entries = std::move(read.entries);
  result.decisions = std::move(read.decisions);
  return result;
}

Longs WholeStep::entries(const Call& call) const {
  Longs added;
  for (std::size_t place = 0; place < manifest_.caches.size(); ++place)
    for (const std::int64_t count : call.counts) added.push_back(call.active[place] != 0 ? count : 0);
  return added;
}

Tensor WholeStep::logits(Binding& binding, const Call& call) const {
  Tensor found = result_of(binding, graph(), "logits", Type::kFloat, {call.rows, -1, manifest_.model.vocab_size});
  if (found.shape[1] < call.asked)
    throw Error(graph().file + ": expected logits of " + std::to_string(call.asked) + " tokens, found " +
                std::to_string(found.shape[1]) + "; convert again");
  return found;
}

Arrays WholeStep::inputs(const KvCache::State& cache, const Call& call) const {
  const Longs by_token{call.rows, call.tokens};
  Arrays found;
  found["input_ids"] = Array::of_longs(by_token, call.ids);
  found["position_ids"] =
      Array::of_longs(by_token, position_ids(positions_of(cache, call), call.tokens, manifest_.model.max_length - 1));
  Longs lengths;
  for (const std::int64_t place : places_)
    for (std::int64_t row = 0; row < call.rows; ++row) lengths.push_back(cache.counts.length(place, call.first + row));
  found["cache_lengths"] = Array::of_longs({static_cast<std::int64_t>(places_.size()), call.rows}, lengths);
  Longs wanted = call.wanted;
  std::int64_t asked = call.asked;
  if (asked == 0 && !graph().profiles.empty()) {  // an engine's profiles have at least one
    asked = 1;
    for (const std::int64_t count : call.counts) wanted.push_back(std::max<std::int64_t>(count - 1, 0));
  }
  found["logits_indices"] = Array::of_longs({call.rows, asked}, wanted);
  std::vector<std::uint8_t> active;
  for (const std::int64_t layer : graph().layers) active.push_back(call.active.at(at(layer)));
  found["layer_active"] = Array::of_bools({static_cast<std::int64_t>(active.size())}, active);
  if (reader_.rows() == 0) return found;
  const bool layers = std::holds_alternative<LayerRouting>(manifest_.routing);
  found["token_counts"] = Array::of_longs({call.rows}, call.counts);
  found[layers ? "forced_routes" : "forced_paths"] =
      Array::of_longs({reader_.rows(), call.rows, call.tokens}, call.forced);
  if (layers) found["is_prompt"] = Array::of_bools({}, {static_cast<std::uint8_t>(call.is_prompt ? 1 : 0)});
  return found;
}

}  // namespace dynexport
