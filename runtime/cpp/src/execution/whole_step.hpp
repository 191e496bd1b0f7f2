// Runs a graph that computes a whole step: token ids in, logits out, with all KV caches of the call's rows.
#pragma once

#include <memory>
#include <vector>

#include "execution/arrays.hpp"
#include "execution/decisions.hpp"
#include "execution/running.hpp"

namespace dynexport {

class WholeStep : public Running {
 public:
  // Throws Error for a graph that lacks an output or a cache.
  WholeStep(const Manifest& manifest, std::shared_ptr<Engine> engine);

  const Graph& graph() const override { return engine_->graph(); }
  CallResult run(KvCache::State& cache, const Call& call) override;

  const std::shared_ptr<Engine>& engine() const { return engine_; }
  // The graph's inputs for a call, except caches.
  Arrays inputs(const KvCache::State& cache, const Call& call) const;
  // The places of the graph's caches, in the order of the rows of its lengths.
  const std::vector<std::int64_t>& places() const { return places_; }
  // New entries without routers, [caches, B]: one per token in each active layer.
  std::vector<std::int64_t> entries(const Call& call) const;
  // The logits of a call, [B, K or more, vocab].
  Tensor logits(Binding& binding, const Call& call) const;

 private:
  const Manifest& manifest_;
  std::shared_ptr<Engine> engine_;
  DecisionReader reader_;
  std::vector<std::int64_t> places_;
};

}  // namespace dynexport
