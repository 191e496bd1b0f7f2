#include "metrics.hpp"

#include <prometheus/text_serializer.h>

#include <algorithm>
#include <utility>

namespace service {
namespace {

using dynexport::Clock;
using Bounds = prometheus::Histogram::BucketBoundaries;

// vLLM's bounds, in seconds, with smaller ones before them for small models.
const Bounds kFirst = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                       1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640};
const Bounds kGap = {0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
                     0.4,   0.5,    0.75,  1,      2.5,  5,     7.5,  10,    20,  40,   80};
const Bounds kRequest = {0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5,  5,
                         10,   15,    20,   30,  40,  50,  60,  120, 240, 480, 960, 1920, 7680};
const Bounds kTokens = {1,    2,    5,    10,    20,    50,    100,    200,    500,
                        1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};

struct Distribution {
  const char *name, *help;
  const Bounds& bounds;
};

const std::vector<Distribution> kDistributions = {
    {"vllm:time_to_first_token_seconds", "From the submission to the first token.", kFirst},
    {"vllm:inter_token_latency_seconds", "Between two tokens of an answer.", kGap},
    {"vllm:e2e_request_latency_seconds", "From the submission to the end of an answer.", kRequest},
    {"vllm:request_queue_time_seconds", "From the submission to the start of the prompt.", kRequest},
    {"vllm:request_prefill_time_seconds", "From the start of the prompt to the first token.", kRequest},
    {"vllm:request_decode_time_seconds", "From the first token to the end of an answer.", kRequest},
    {"vllm:request_prompt_tokens", "Tokens of a prompt.", kTokens},
    {"vllm:request_generation_tokens", "Tokens of an answer.", kTokens},
};
const std::vector<std::pair<const char*, const char*>> kCounters = {
    {"vllm:prompt_tokens_total", "Tokens of prompts that have run or were reused."},
    {"vllm:generation_tokens_total", "Generated tokens."},
    {"vllm:prefix_cache_queries_total", "Tokens of prompts that have started."},
    {"vllm:prefix_cache_hits_total", "Tokens of prompts whose entries came from earlier requests."},
    {"vllm:spec_decode_num_draft_tokens_total", "Drafted tokens."},
    {"vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens that the full model chose."},
    {"dynexport_requests_refused_total", "Requests that found the queue full."},
    {"dynexport_scheduler_seconds_total", "Time of the scheduler's steps, the engine's included."},
};
const std::vector<std::pair<const char*, const char*>> kGauges = {
    {"vllm:num_requests_waiting", "Requests that wait for rows."},
    {"vllm:num_requests_running", "Answers that hold rows."},
    {"vllm:kv_cache_usage_perc", "Share of the cache's tokens in use, 0 to 1."},
    {"dynexport_rows", "Most answers that run at a time."},
    {"dynexport_ready", "1 if the worker takes requests, else 0."},
    {"dynexport_prefix_bytes", "Memory of the entries of earlier prompts."},
};
// The reason of an answer's end, as vLLM calls it.
const std::map<std::string, std::string> kFinished = {{"stop", "stop"},       {"length", "length"},
                                                      {"cancelled", "abort"}, {"timeout", "abort"},
                                                      {"closed", "abort"},    {"failed", "error"}};
const std::vector<std::string> kFailures = {"cancelled", "timeout", "failed", "closed"};

// prometheus-cpp registers no name with a colon: names have an underscore there until they are written.
constexpr char kColon = ':', kInPlace = '_';
const std::string kPrefix = "vllm";

std::string registered(std::string name) {
  std::replace(name.begin(), name.end(), kColon, kInPlace);
  return name;
}

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

ModelWatch::ModelWatch(prometheus::Registry& registry, const std::string& model_name,
                       const dynexport::Manifest& manifest)
    : depths_(registry, model_name, manifest) {
  const prometheus::Labels labels = {{"model_name", model_name}};
  const auto labelled = [&](const char* name, const char* help, const char* label, const std::string& value) {
    return &prometheus::BuildCounter()
                .Name(registered(name))
                .Help(help)
                .Register(registry)
                .Add({{"model_name", model_name}, {label, value}});
  };
  for (const auto& [name, help] : kCounters) {
    counters_[name] = &prometheus::BuildCounter().Name(registered(name)).Help(help).Register(registry).Add(labels);
  }
  for (const auto& [name, help] : kGauges) {
    gauges_[name] = &prometheus::BuildGauge().Name(registered(name)).Help(help).Register(registry).Add(labels);
  }
  for (const auto& [name, help, bounds] : kDistributions) {
    histograms_[name] =
        &prometheus::BuildHistogram().Name(registered(name)).Help(help).Register(registry).Add(labels, bounds);
  }
  for (const auto& [reason, finished] : kFinished) {
    ended_[reason] = labelled("vllm:request_success_total", "Answers that ended.", "finished_reason", finished);
  }
  for (const std::string& reason : kFailures) {
    failures_[reason] = labelled("dynexport_request_failures_total", "Requests that ended without all their answers.",
                                 "reason", reason);
  }
  for (const char* phase : {"prompt", "decode"}) {
    engine_[phase] = labelled("dynexport_engine_seconds_total", "Time of the engine's calls.", "phase", phase);
  }
}

// Returns the state of a request, which may fail before it has started.
ModelWatch::Running& ModelWatch::running_of(const dynexport::Work& work) {
  const auto [found, made] = running_.try_emplace(&work);
  if (made) {
    found->second.begun = Clock::now();
    found->second.answers = work.requests.size();
  }
  return found->second;
}

void ModelWatch::started(const dynexport::Work& work, double waited) {
  const auto tokens = static_cast<double>(work.prompt.size());
  running_of(work);
  histograms_.at("vllm:request_queue_time_seconds")->Observe(waited);
  histograms_.at("vllm:request_prompt_tokens")->Observe(tokens);
  counters_.at("vllm:prefix_cache_queries_total")->Increment(tokens);
  counters_.at("vllm:prefix_cache_hits_total")->Increment(static_cast<double>(work.reused));
  counters_.at("vllm:prompt_tokens_total")->Increment(static_cast<double>(work.reused));
}

void ModelWatch::ran(std::int64_t prompt_tokens, std::int64_t, double seconds) {
  engine_.at(prompt_tokens != 0 ? "prompt" : "decode")->Increment(seconds);
  counters_.at("vllm:prompt_tokens_total")->Increment(static_cast<double>(prompt_tokens));
}

void ModelWatch::answered(const dynexport::Answer& answer, double gap, bool first) {
  counters_.at("vllm:generation_tokens_total")->Increment();
  if (!first) {
    histograms_.at("vllm:inter_token_latency_seconds")->Observe(gap);
    return;
  }
  histograms_.at("vllm:time_to_first_token_seconds")->Observe(gap);
  Running& running = running_of(*answer.work);
  running.first = Clock::now();
  histograms_.at("vllm:request_prefill_time_seconds")->Observe(seconds_between(running.begun, running.first));
}

void ModelWatch::ended(const dynexport::Answer& answer, std::string_view reason,
                       const std::vector<dynexport::Decisions>& decided, std::int64_t) {
  using dynexport::Phase;
  const dynexport::Work& work = *answer.work;
  const std::string why(reason);
  const Clock::time_point now = Clock::now();
  const auto generated = static_cast<std::int64_t>(answer.tokens.size());
  ended_.at(why)->Increment();
  histograms_.at("vllm:e2e_request_latency_seconds")->Observe(seconds_between(work.arrived, now));
  histograms_.at("vllm:request_generation_tokens")->Observe(static_cast<double>(generated));
  counters_.at("vllm:spec_decode_num_draft_tokens_total")->Increment(static_cast<double>(answer.drafted));
  counters_.at("vllm:spec_decode_num_accepted_tokens_total")->Increment(static_cast<double>(answer.accepted));
  Running& running = running_of(work);
  if (generated != 0) {
    histograms_.at("vllm:request_decode_time_seconds")->Observe(seconds_between(running.first, now));
  }
  // A prompt that several answers share counts once.
  const bool counts = !std::exchange(running.counted, true);
  if (depths_.has_routers()) {
    std::int64_t left = static_cast<std::int64_t>(work.prompt.size()) - work.reused;
    for (const dynexport::Decisions& call : decided) {
      if (left <= 0 || counts) depths_.add(left > 0 ? Phase::kPrompt : Phase::kDecode, call);
      left -= call.tokens;
    }
  } else {
    if (counts) {
      depths_.add_unrouted(Phase::kPrompt, answer.done - work.reused,
                           static_cast<std::int64_t>(answer.depth().prompt.size()));
    }
    depths_.add_unrouted(Phase::kDecode, generated - 1, static_cast<std::int64_t>(answer.depth().keep.size()));
  }
  if (--running.answers != 0) return;
  running_.erase(&work);
  const auto failed = failures_.find(why);
  if (failed != failures_.end()) failed->second->Increment();
}

void ModelWatch::dropped(const dynexport::Work&, dynexport::Reason reason) {
  failures_.at(std::string(dynexport::name_of(reason)))->Increment();
}

void ModelWatch::refused() { counters_.at("dynexport_requests_refused_total")->Increment(); }

void ModelWatch::stepped(double seconds) { counters_.at("dynexport_scheduler_seconds_total")->Increment(seconds); }

void ModelWatch::read(const dynexport::Worker& worker) {
  const dynexport::Scheduler& scheduler = worker.scheduler();
  gauges_.at("vllm:num_requests_waiting")->Set(static_cast<double>(worker.waiting()));
  gauges_.at("vllm:num_requests_running")->Set(static_cast<double>(scheduler.running()));
  gauges_.at("vllm:kv_cache_usage_perc")->Set(scheduler.used());
  gauges_.at("dynexport_rows")->Set(static_cast<double>(scheduler.rows()));
  gauges_.at("dynexport_ready")->Set(worker.problem().empty() ? 1 : 0);
  gauges_.at("dynexport_prefix_bytes")->Set(static_cast<double>(scheduler.prefix_bytes()));
}

ModelWatch* Metrics::watch(const std::string& model_name, const dynexport::Manifest& manifest) {
  return watches_.emplace_back(std::make_unique<ModelWatch>(registry_, model_name, manifest)).get();
}

void Metrics::attach(ModelWatch* watch, const dynexport::Worker* worker) { attached_.emplace_back(watch, worker); }

std::string Metrics::expose() {
  for (const auto& [watch, worker] : attached_) watch->read(*worker);
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  for (prometheus::MetricFamily& family : families) {
    if (family.name.rfind(kPrefix + kInPlace, 0) == 0) family.name[kPrefix.size()] = kColon;
  }
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace service
