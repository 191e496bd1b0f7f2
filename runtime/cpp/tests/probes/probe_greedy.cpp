// Decodes greedily and measures: BUNDLE DEPTH NEW THREADS ID,ID,... Prints ids, the gaps of their logits, and
// medians of times: the engine's step, what surrounds it, and the choice of a token.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "dynexport/error.hpp"
#include "dynexport/executor.hpp"
#include "dynexport/sampler.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using Times = std::vector<double>;

double ms(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

double median(Times values) {
  if (values.empty()) return 0;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// The engine's own time in a step: the entry of ONNX Runtime's table that runs a binding is replaced by one that
// measures.
struct Measured {
  static inline OrtApi table;
  static inline decltype(OrtApi::RunWithBinding) original;
  static inline double last = 0;

  static OrtStatus* ORT_API_CALL run(OrtSession* session, const OrtRunOptions* options,
                                     const OrtIoBinding* binding) noexcept {
    const auto start = Clock::now();
    OrtStatus* status = original(session, options, binding);
    last = ms(start, Clock::now());
    return status;
  }

  static void install() {
    table = Ort::GetApi();
    original = table.RunWithBinding;
    table.RunWithBinding = run;
    Ort::InitApi(&table);
  }
};

}  // namespace

int main(int count, char** arguments) try {
  if (count != 6) throw dynexport::Error("expected BUNDLE DEPTH NEW THREADS ID,ID,...");
  const auto start = Clock::now();
  const auto bundle = dynexport::Bundle::open(arguments[1]);
  const dynexport::Depth depth = bundle->depth(std::string(arguments[2]));
  dynexport::BackendOptions options;
  options.threads = std::stoi(arguments[4]);
  dynexport::Executor executor(bundle, options);
  executor.load(dynexport::Phase::kPrompt, depth);
  executor.load(dynexport::Phase::kDecode, depth);
  const double load = ms(start, Clock::now());
  Measured::install();

  std::vector<std::int64_t> prompt, ids;
  std::stringstream list(arguments[5]);
  for (std::string id; std::getline(list, id, ',');) prompt.push_back(std::stoll(id));
  const auto wanted = static_cast<std::size_t>(std::stoll(arguments[3]));
  const auto cache = executor.cache(1, static_cast<std::int64_t>(prompt.size() + wanted));
  cache->acquire();
  dynexport::Batch batch;
  batch.rows = {0};
  batch.tokens = {prompt};
  batch.depths = {depth};
  const dynexport::StepResult first = executor.run(*cache, batch);
  const float* logits = first.logits[0].data();
  dynexport::Sampler sampler({}, prompt, {}, executor.manifest().model.vocab_size);
  std::vector<float> gaps;
  Times steps, outside, choosing;
  while (ids.size() < wanted) {
    const auto before = Clock::now();
    const std::int64_t id = sampler.choose(logits).token;
    const auto chosen = Clock::now();
    std::vector<float> two(2);
    std::partial_sort_copy(logits, logits + executor.manifest().model.vocab_size, two.begin(), two.end(),
                           std::greater<>());
    ids.push_back(id);
    gaps.push_back(two[0] - two[1]);
    const auto again = Clock::now();
    logits = executor.decode(*cache, {0}, {id}, {depth});
    const double step = ms(again, Clock::now());
    choosing.push_back(ms(before, chosen));
    steps.push_back(step);
    outside.push_back(step - Measured::last);
  }
  std::cout << nlohmann::json{{"ids", ids},
                              {"gaps", gaps},
                              {"load_ms", load},
                              {"step_ms", median(steps)},
                              {"outside_ms", median(outside)},
                              {"choosing_ms", median(choosing)}}
            << "\n";
  return dynexport::kExitGood;
} catch (const dynexport::Error& error) {
  std::cerr << "error: " << error.what() << "\n";
  return dynexport::kExitBadInput;
}
