#include "depth_counts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <variant>

namespace service {
namespace {

using Bounds = prometheus::Histogram::BucketBoundaries;

// Upper bounds of margins. A routed layer's margin is a difference of probabilities, counted as negative for a token
// that skips the layer; a path's is a difference of scores.
const Bounds kLayerMargins = {-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5};
const Bounds kPathMargins = {0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0};
constexpr std::int64_t kMostDepths = 16;  // buckets of a histogram of depths

// Returns at most 17 numbers of layers from 0 to the largest.
Bounds depth_bounds(std::int64_t most) {
  const std::int64_t steps = std::max<std::int64_t>(1, std::min(most, kMostDepths));
  Bounds bounds;
  for (std::int64_t step = 0; step <= steps; ++step) {
    const std::int64_t bound = most * step / steps;
    bounds.push_back(static_cast<double>(bound));
  }
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  return bounds;
}

}  // namespace

DepthCounts::DepthCounts(prometheus::Registry& registry, const std::string& model_name,
                         const dynexport::Manifest& manifest) {
  std::int64_t most = manifest.model.layers;
  std::vector<std::string> routers;
  if (const auto* layers = std::get_if<dynexport::LayerRouting>(&manifest.routing)) {
    layers_ = layers->layers;
    routers = layers->names();
  } else if (const auto* path = std::get_if<dynexport::PathRouting>(&manifest.routing)) {
    paths_ = true;
    layers_.resize(static_cast<std::size_t>(most));
    std::iota(layers_.begin(), layers_.end(), 0);
    most = path->hops;
    for (std::int64_t router = 0; router < most; ++router) routers.push_back(std::to_string(router));
  }
  auto& depths = prometheus::BuildHistogram()
                     .Name("dynexport_token_layers")
                     .Help("Layers that a token ran in.")
                     .Register(registry);
  for (const dynexport::Phase phase : {dynexport::Phase::kPrompt, dynexport::Phase::kDecode}) {
    token_layers_[phase] = &depths.Add({{"model_name", model_name}, {"phase", std::string(dynexport::name_of(phase))}},
                                       depth_bounds(most));
  }
  if (routers.empty()) return;
  const prometheus::Labels labels = {{"model_name", model_name}};
  const auto counter = [&](const char* name, const char* help) -> prometheus::Family<prometheus::Counter>& {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  };
  auto& runs = counter("dynexport_layer_runs_total", "Tokens that ran in a layer that routers decide about.");
  for (const std::int64_t layer : layers_) {
    runs_.push_back(&runs.Add({{"model_name", model_name}, {"layer", std::to_string(layer)}}));
  }
  tokens_ = &counter("dynexport_routed_tokens_total", "Tokens that routers decided about.").Add(labels);
  overflow_ = &counter("dynexport_overflow_tokens_total", "Tokens that found a layer or its cache full.").Add(labels);
  auto& margins = prometheus::BuildHistogram()
                      .Name("dynexport_router_margin")
                      .Help("Margins of routers' decisions.")
                      .Register(registry);
  for (const std::string& router : routers) {
    routers_.push_back(
        &margins.Add({{"model_name", model_name}, {"router", router}}, paths_ ? kPathMargins : kLayerMargins));
  }
}

void DepthCounts::add(dynexport::Phase phase, const dynexport::Decisions& call) {
  const auto tokens = static_cast<std::size_t>(call.tokens);
  const std::size_t rows = std::min(static_cast<std::size_t>(call.rows), routers_.size());
  const std::size_t all_layers = tokens == 0 ? 0 : call.ran.size() / tokens;
  for (std::size_t token = 0; token < tokens; ++token) {
    std::int64_t ran = 0;
    for (std::size_t row = 0; paths_ && row < rows; ++row) {
      const std::int64_t choice = call.choices[row * tokens + token];
      ran += choice >= 0 && choice < static_cast<std::int64_t>(all_layers) ? 1 : 0;
    }
    for (std::size_t layer = 0; !paths_ && layer < all_layers; ++layer) ran += call.ran[layer * tokens + token];
    token_layers_[phase]->Observe(static_cast<double>(ran));
    for (std::size_t row = 0; row < rows; ++row) {
      const double margin = call.margins[row * tokens + token];
      const bool skipped = !paths_ && call.choices[row * tokens + token] != 1;
      if (std::isfinite(margin)) routers_[row]->Observe(skipped ? -margin : margin);
    }
  }
  for (std::size_t at = 0; at < layers_.size(); ++at) {
    const auto begin = call.ran.begin() + layers_[at] * call.tokens;
    runs_[at]->Increment(static_cast<double>(std::accumulate(begin, begin + call.tokens, std::int64_t{0})));
  }
  tokens_->Increment(static_cast<double>(call.tokens));
  overflow_->Increment(
      static_cast<double>(std::accumulate(call.overflow.begin(), call.overflow.end(), std::int64_t{0})));
}

void DepthCounts::add_unrouted(dynexport::Phase phase, std::int64_t tokens, std::int64_t layers) {
  for (std::int64_t token = 0; token < tokens; ++token) token_layers_[phase]->Observe(static_cast<double>(layers));
}

}  // namespace service
