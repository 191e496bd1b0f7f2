// Metrics for Prometheus, under the names of the Python server.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "depth_counts.hpp"
#include "dynexport/work.hpp"
#include "dynexport/worker.hpp"

namespace service {

// Counts what a scheduler does for one model.
class ModelWatch final : public dynexport::Watch {
 public:
  ModelWatch(prometheus::Registry& registry, const std::string& model_name, const dynexport::Manifest& manifest);

  void started(const dynexport::Work& work, double waited) override;
  void ran(std::int64_t prompt_tokens, std::int64_t rows, double seconds) override;
  void answered(const dynexport::Answer& answer, double gap, bool first) override;
  void ended(const dynexport::Answer& answer, std::string_view reason, const std::vector<dynexport::Decisions>& decided,
             std::int64_t overflow) override;
  void dropped(const dynexport::Work& work, dynexport::Reason reason) override;
  void refused() override;
  void stepped(double seconds) override;

  // Sets the metrics that are read from a worker.
  void read(const dynexport::Worker& worker);

 private:
  // The state of a running request.
  struct Running {
    dynexport::Clock::time_point begun, first;
    std::size_t answers = 0;  // that have not ended
    bool counted = false;     // its prompt's tokens were counted
  };

  Running& running_of(const dynexport::Work& work);

  std::map<std::string, prometheus::Counter*> counters_, ended_, failures_, engine_;
  std::map<std::string, prometheus::Histogram*> histograms_;
  std::map<std::string, prometheus::Gauge*> gauges_;
  DepthCounts depths_;
  std::unordered_map<const dynexport::Work*, Running> running_;
};

// The metrics of all models of a server.
class Metrics {
 public:
  // Returns what counts for a model, to be given to its worker, and the worker to attach.
  ModelWatch* watch(const std::string& model_name, const dynexport::Manifest& manifest);
  void attach(ModelWatch* watch, const dynexport::Worker* worker);

  // Returns all metrics in Prometheus' text format.
  std::string expose();

 private:
  prometheus::Registry registry_;
  std::vector<std::unique_ptr<ModelWatch>> watches_;
  std::vector<std::pair<ModelWatch*, const dynexport::Worker*>> attached_;
};

}  // namespace service
