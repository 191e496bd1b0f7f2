// Consecutive decode steps of the same rows at one depth.
#include "execution/plain_step.hpp"

#include <algorithm>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"
#include "execution/checking.hpp"
#include "execution/whole_step.hpp"

namespace dynexport {
namespace {

std::int64_t* longs_of(Binding& binding, const Graph& graph, const char* name, std::size_t count) {
  const Tensor found = binding.input(name);
  if (found.type != Type::kInt64 || found.bytes() != count * sizeof(std::int64_t))
    throw Error(graph.file + ": " + name + ": expected int64 of another size; convert again");
  return found.as<std::int64_t>();
}

}  // namespace

PlainStep::PlainStep(const WholeStep& running, const KvCache::State& cache, const Call& call)
    : first_(call.first),
      counts_(call.counts),
      places_(running.places()),
      entries_(running.entries(call)),
      engine_(running.engine()) {
  const Arrays inputs = running.inputs(cache, call);
  const Graph& graph = running.graph();
  binding_ = engine_->bind(shapes_of(graph, inputs), cache.caches(call.first, call.rows));
  write_inputs(graph, *binding_, inputs);
  ids_ = longs_of(*binding_, graph, "input_ids", counts_.size());
  positions_ = longs_of(*binding_, graph, "position_ids", counts_.size());
  lengths_ = longs_of(*binding_, graph, "cache_lengths", places_.size() * counts_.size());
  const Tensor logits = running.logits(*binding_, call);
  if (logits.shape[1] != 1)
    throw Error(graph.file + ": logits: expected those of one token, found more; convert again");
  logits_ = logits.as<float>();
}

const float* PlainStep::run(KvCache::State& cache, const std::vector<std::int64_t>& ids) {
  std::copy(ids.begin(), ids.end(), ids_);
  std::int64_t* length = lengths_;
  const auto rows = static_cast<std::int64_t>(counts_.size());
  for (std::int64_t row = 0; row < rows; ++row) positions_[row] = cache.counts.position(first_ + row);
  for (const std::int64_t place : places_)
    for (std::int64_t row = 0; row < rows; ++row) *length++ = cache.counts.length(place, first_ + row);
  binding_->run();
  cache.commit(first_, counts_, entries_, none_);
  return logits_;
}

bool LatestStep::is(std::int64_t other_first, std::int64_t other_rows, const Depth& other) const {
  return first == other_first && rows == other_rows && same_depth(depth, other);
}

}  // namespace dynexport
