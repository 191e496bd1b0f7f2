// Runs a set of graphs hop by hop: tokens are grouped by their chosen layer, and each group runs in one call. In
// attention, a token attends to the other tokens of its row, whichever layers they chose.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "execution/arrays.hpp"
#include "execution/decisions.hpp"
#include "execution/lines.hpp"
#include "execution/running.hpp"
#include "execution/walk.hpp"

namespace dynexport {

// The engines of a set's graphs, by graph name.
using SetEngines = std::map<std::string, std::shared_ptr<Engine>>;

class RunningSet : public Running {
 public:
  RunningSet(const Manifest& manifest, const GraphSet& names, const SetEngines& engines);

  // The graph whose sizes limit the number of a row's tokens in a call.
  const Graph& graph() const override { return attention_->graph(); }
  CallResult run(KvCache::State& cache, const Call& call) override;

 private:
  Walk begin(KvCache::State& cache, const Call& call) const;
  void embed(KvCache::State& cache, Walk& walk, const Indices& ids) const;
  void run_hop(KvCache::State& cache, Walk& walk, std::int64_t hop, const Chosen& chosen) const;
  Arrays prepared(KvCache::State& cache, const Walk& walk, const Indices& tokens, const Groups& groups) const;
  Array attended(KvCache::State& cache, Walk& walk, std::int64_t hop, const Indices& tokens, const Groups& groups,
                 const Arrays& prepared) const;
  Array attend(KvCache::State& cache, Walk& walk, std::int64_t place, std::int64_t hop, std::int64_t first,
               Arrays inputs) const;
  Binding& appended(const std::shared_ptr<Engine>& engine, KvCache::State& cache, Walk& walk, std::int64_t place,
                    std::int64_t hop, std::int64_t first, Arrays inputs) const;
  void run_layer(KvCache::State& cache, Walk& walk, std::int64_t hop, std::int64_t layer, const Chosen& chosen) const;
  void finish(KvCache::State& cache, Walk& walk, const Chosen& chosen, const Groups& groups,
              const Array& attended) const;
  std::vector<float> wanted_logits(KvCache::State& cache, const Walk& walk, const Call& call) const;
  std::vector<float> logits(KvCache::State& cache, const Array& hidden_states) const;
  std::vector<Decisions> decisions(const Walk& walk, const Call& call) const;

  const PathRouting& routing_;
  DecisionReader reader_;
  std::int64_t layers_, vocabulary_;
  std::shared_ptr<Engine> embedding_, attention_, head_;
  std::vector<std::shared_ptr<Engine>> routers_, before_, after_, whole_;
};

}  // namespace dynexport
