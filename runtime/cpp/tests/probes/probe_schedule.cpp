// Runs a script of requests on a scheduler, step by step, or without it, each "alone" or all "together": JSON on
// standard input, what was delivered as JSON. {"bundle", "settings", "requests": [{"prompt", "max_new_tokens", "n",
// "depth", "sampling", "arrive", "cancel", "seconds", ..}]}; "arrive" and "cancel" are numbers of steps.
#include <algorithm>
#include <exception>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dynexport/error.hpp"
#include "dynexport/generator.hpp"
#include "dynexport/scheduler.hpp"
#include "sampling_json.hpp"

namespace {

using dynexport::Generator;
using dynexport::Work;
using nlohmann::json;

constexpr int kMostSteps = 5000;

dynexport::Options options_of(const json& given) {
  dynexport::Options options;
  options.sampling = sampling_of(given.value("sampling", json::object()));
  options.max_new_tokens = given.value("max_new_tokens", options.max_new_tokens);
  if (given.contains("depth") && !given["depth"].is_null()) options.depth = given["depth"].get<std::string>();
  options.stop = given.value("stop", options.stop);
  options.stop_token_ids = given.value("stop_token_ids", options.stop_token_ids);
  options.chat = given.value("chat", false);
  options.chunk.first = given.value("chunk", options.chunk.first);
  options.chunk.even = given.value("even", false);
  return options;
}

// How tokens are drafted: {"most", "draft"}, or none.
std::optional<dynexport::Speculation> speculation_of(const Generator& model, const json& given) {
  if (!given.contains("speculation")) return std::nullopt;
  dynexport::Speculation made;
  made.most = given["speculation"]["most"];
  made.always = given["speculation"].value("always", false);
  if (given["speculation"].contains("draft"))
    made.depth = model.bundle().depth(given["speculation"]["draft"].get<std::string>());
  return made;
}

json reason_of(const dynexport::StopReason& reason) {
  if (const auto* token = std::get_if<std::int64_t>(&reason)) return *token;
  if (const auto* text = std::get_if<std::string>(&reason)) return *text;
  return nullptr;
}

json told(const dynexport::Piece& piece) {
  json finish;
  if (piece.finish) finish = name_of(*piece.finish);
  json draft;
  if (piece.draft) draft = *piece.draft;
  return {piece.row, piece.token, piece.text, finish, reason_of(piece.stop_reason), piece.layers, draft};
}

// Counts what a scheduler reports.
class Counts : public dynexport::Watch {
 public:
  void started(const Work& /*work*/, double /*waited*/) override { ++counts_["started"]; }
  void ran(std::int64_t prompt_tokens, std::int64_t rows, double /*seconds*/) override {
    counts_["prompt"] += prompt_tokens;
    counts_["decode"] += prompt_tokens == 0 ? rows : 0;
  }
  void answered(const dynexport::Answer& /*answer*/, double /*gap*/, bool first) override {
    ++counts_[first ? "first" : "later"];
  }
  void ended(const dynexport::Answer& /*answer*/, std::string_view reason,
             const std::vector<dynexport::Decisions>& decided, std::int64_t overflow) override {
    ++counts_[std::string(reason)];
    counts_["overflow"] += overflow;
    for (const dynexport::Decisions& call : decided) counts_["decided"] += call.tokens;
  }
  void dropped(const Work& /*work*/, dynexport::Reason reason) override {
    ++counts_["dropped " + std::string(name_of(reason))];
  }
  void stepped(double /*seconds*/) override { ++counts_["steps"]; }

  const std::map<std::string, std::int64_t>& counts() const { return counts_; }

 private:
  std::map<std::string, std::int64_t> counts_;
};

class Script {
 public:
  Script(Generator& model, const json& given) : model_(model), requests_(given["requests"]) {
    dynexport::Settings settings;
    const json sizes = given.value("settings", json::object());
    settings.rows = sizes.value("rows", settings.rows);
    settings.chunk = sizes.value("chunk", settings.chunk);
    settings.prefix_bytes = sizes.value("prefix_bytes", settings.prefix_bytes);
    if (sizes.contains("tokens")) settings.tokens = sizes["tokens"].get<std::int64_t>();
    if (sizes.contains("reserved")) settings.reserved = sizes["reserved"].get<std::int64_t>();
    settings.speculation = speculation_of(model, given);
    scheduler_.emplace(model.executor(), settings, &counts_);
    works_.resize(requests_.size());
  }

  json run() {
    json steps = json::array();
    const int last = std::max(latest("arrive"), latest("cancel"));
    for (int step = 0; step <= last || !scheduler_->idle(); ++step) {
      if (step > kMostSteps) throw std::runtime_error("the scheduler does not come to an end");
      for (std::size_t index = 0; index < requests_.size(); ++index) arrive(index, step);
      scheduler_->step();
      steps.push_back(std::move(delivered_));
      delivered_ = json::array();
    }
    json reused = json::array();
    for (const auto& work : works_) reused.push_back(work ? work->reused : 0);
    return {{"steps", steps},
            {"refused", refused_},
            {"reused", reused},
            {"counts", counts_.counts()},
            {"used", scheduler_->used()},
            {"prefix_bytes", scheduler_->prefix_bytes()},
            {"failures", scheduler_->failures()}};
  }

 private:
  int latest(const char* name) const {
    int found = 0;
    for (const json& request : requests_) found = std::max(found, request.value(name, 0));
    return found;
  }

  void arrive(std::size_t index, int step) {
    const json& given = requests_[index];
    if (given.value("cancel", -1) == step && works_[index]) works_[index]->cancelled = true;
    if (given.value("arrive", 0) != step) return;
    std::optional<double> seconds;
    if (given.contains("seconds")) seconds = given["seconds"].get<double>();
    try {
      works_[index] = make_work(model_, given["prompt"], options_of(given), given.value("n", 1), seconds,
                                [this, index](const dynexport::Delivery& delivery) { take(index, delivery); });
      scheduler_->check(*works_[index]);
      works_[index]->arrived = dynexport::Clock::now();
      scheduler_->add(works_[index]);
    } catch (const dynexport::Error& error) {
      refused_[std::to_string(index)] = error.what();
    }
  }

  void take(std::size_t index, const dynexport::Delivery& delivery) {
    json pieces = json::array(), failure;
    for (const dynexport::Piece& piece : delivery.pieces) pieces.push_back(told(piece));
    if (delivery.failure) failure = {name_of(delivery.failure->reason), delivery.failure->message};
    delivered_.push_back({index, pieces, failure, delivery.done});
  }

  Generator& model_;
  const json& requests_;
  Counts counts_;
  std::optional<dynexport::Scheduler> scheduler_;
  std::vector<std::shared_ptr<Work>> works_;
  json delivered_ = json::array(), refused_ = json::object();
};

// Generates from the prompts of some requests in one batch; after so many pieces as "take" says it is cancelled.
json generated(Generator& model, const std::vector<json>& requests, std::int64_t n,
               const std::optional<dynexport::Speculation>& speculation) {
  json pieces = json::array();
  const std::size_t most = requests.front().value("take", std::size_t{0});
  std::vector<Generator::Prompt> prompts;
  std::vector<dynexport::Options> options;
  try {
    for (const json& given : requests) {
      prompts.push_back(given["prompt"]);
      options.push_back(options_of(given));
      options.back().speculation = speculation;
    }
    const auto push = [&pieces, most](const dynexport::Piece& piece) {
      pieces.push_back(told(piece));
      return pieces.size() != most;
    };
    const bool whole = model.stream(prompts, options, push, n);
    return {{"pieces", pieces}, {"whole", whole}};
  } catch (const dynexport::Error& error) {
    return {{"error", error.what()}, {"pieces", pieces}};
  }
}

}  // namespace

int main() try {
  const json given = json::parse(std::cin);
  dynexport::BackendOptions options;
  options.threads = given.value("threads", 1);
  const auto model = Generator::load(given["bundle"].get<std::string>(), options);
  const auto speculation = speculation_of(*model, given);
  json made;
  if (given.value("alone", false)) {
    for (const json& request : given["requests"])
      made.push_back(generated(*model, {request}, request.value("n", 1), speculation));
  } else if (given.value("together", false)) {
    made = generated(*model, given["requests"], 1, speculation);
  } else {
    made = Script(*model, given).run();
  }
  std::cout << made;
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
