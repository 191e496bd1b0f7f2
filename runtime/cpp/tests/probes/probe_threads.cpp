// Threads that share an executor, each with its own cache: BUNDLE THREADS STEPS. Prints how many steps of theirs gave
// what the same steps give alone.
#include <algorithm>
#include <exception>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "dynexport/error.hpp"
#include "dynexport/executor.hpp"

namespace {

using Logits = std::vector<std::vector<float>>;

// A prompt and some greedy steps of two rows; ``seed`` tells threads' texts apart. The depth changes on the way.
Logits told_by(dynexport::Executor& executor, std::int64_t seed, std::int64_t steps) {
  const dynexport::Manifest& manifest = executor.manifest();
  const auto vocabulary = static_cast<std::size_t>(manifest.model.vocab_size);
  const std::unique_ptr<dynexport::KvCache> cache = executor.cache(2, 8 + steps, false, 4);
  dynexport::Batch batch;
  batch.rows = cache->acquire(2);
  for (std::int64_t row = 0; row < 2; ++row) {
    batch.tokens.emplace_back();
    for (std::int64_t i = 0; i < 5; ++i) batch.tokens.back().push_back((7 * seed + 3 * row + i) % 60);
  }
  batch.depths = {manifest.full()};
  Logits found = executor.run(*cache, batch).logits;
  std::vector<std::int64_t> tokens;
  for (const std::vector<float>& logits : found)
    tokens.push_back(std::max_element(logits.begin(), logits.end()) - logits.begin());
  for (std::int64_t step = 0; step < steps; ++step) {
    const bool kept = step > steps / 2 && !manifest.depths.empty();
    const float* logits =
        executor.decode(*cache, batch.rows, tokens, {kept ? manifest.depths.front() : manifest.full()});
    for (std::size_t row = 0; row < 2; ++row) {
      const float* its = logits + row * vocabulary;
      found.emplace_back(its, its + vocabulary);
      tokens[row] = std::max_element(its, its + vocabulary) - its;
    }
  }
  return found;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 4) throw dynexport::Error("expected BUNDLE THREADS STEPS");
  const auto bundle = dynexport::Bundle::open(arguments[1]);
  const auto threads = static_cast<std::size_t>(std::stoul(arguments[2]));
  const std::int64_t steps = std::stoll(arguments[3]);
  dynexport::BackendOptions options;
  options.threads = 1;
  dynexport::Executor executor(bundle, options), alone(bundle, options);
  std::vector<Logits> found(threads);
  std::vector<std::exception_ptr> errors(threads);
  std::vector<std::thread> running;
  for (std::size_t i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      try {
        found[i] = told_by(executor, static_cast<std::int64_t>(i), steps);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  for (std::thread& thread : running) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  std::size_t same = 0, all = 0;
  for (std::size_t i = 0; i < threads; ++i) {
    const Logits expected = told_by(alone, static_cast<std::int64_t>(i), steps);
    all += expected.size();
    for (std::size_t j = 0; j < expected.size(); ++j) same += found[i].at(j) == expected[j] ? 1 : 0;
  }
  std::cout << same << " of " << all << "\n";
  return same == all ? dynexport::kExitGood : dynexport::kExitCheckFailed;
} catch (const dynexport::Error& error) {
  std::cerr << "error: " << error.what() << "\n";
  return dynexport::kExitBadInput;
}
