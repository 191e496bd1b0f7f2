// Counts of the layers that tokens ran in, and of routers' margins.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "dynexport/kv_cache.hpp"
#include "dynexport/manifest.hpp"

namespace service {

// The counts of one model's tokens, as metrics. One thread adds.
class DepthCounts {
 public:
  DepthCounts(prometheus::Registry& registry, const std::string& model_name, const dynexport::Manifest& manifest);

  bool has_routers() const { return !routers_.empty(); }
  // Counts the tokens of one call of one row.
  void add(dynexport::Phase phase, const dynexport::Decisions& call);
  // Counts tokens that ran in the same number of layers, without routers.
  void add_unrouted(dynexport::Phase phase, std::int64_t tokens, std::int64_t layers);

 private:
  bool paths_ = false;                // routers choose paths, not whether a layer runs
  std::vector<std::int64_t> layers_;  // that routers decide about
  std::map<dynexport::Phase, prometheus::Histogram*> token_layers_;
  std::vector<prometheus::Counter*> runs_;       // by layers_
  std::vector<prometheus::Histogram*> routers_;  // margins
  prometheus::Counter *tokens_ = nullptr, *overflow_ = nullptr;
};

}  // namespace service
