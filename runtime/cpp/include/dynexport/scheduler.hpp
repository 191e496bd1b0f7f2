// Runs many requests on the rows of one cache: which start, whose prompt goes on, who gets a token.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "dynexport/executor.hpp"
#include "dynexport/work.hpp"

namespace dynexport {

// The sizes and bounds of a scheduler.
struct Settings {
  std::int64_t rows = 8;                   // most answers that run at a time
  std::optional<std::int64_t> tokens;      // most tokens of a request, prompt and answer; none for the model's context
  std::int64_t chunk = 48;                 // a prompt's first tokens that run between two decode steps of the others
  std::int64_t queue = 256;                // most requests that wait
  std::optional<std::int64_t> reserved;    // most tokens of all running requests together; none for rows * tokens
  std::int64_t prefix_bytes = 0;           // memory for the entries of earlier prompts; 0 keeps none
  std::optional<Speculation> speculation;  // how tokens are drafted; none drafts none

  // Throws Error for a number out of its range.
  void check() const;
};

// Memory for known prefixes where a user does not choose, in bytes.
constexpr std::int64_t kPrefixBytes = 256 << 20;

// Runs requests step by step, in one thread; the numbers that it returns may be read by any thread.
//
// A step starts requests that fit, runs one chunk of one prompt, and then a decode step of all rows whose prompts have
// run. So the others wait for one chunk at most, and a request that is cancelled frees its rows within a step.
class Scheduler {
 public:
  // ``executor`` and ``watch`` must live longer; no watch ignores what happens. Throws Error for settings out of their
  // range, or a cache that does not fit into memory or the engines' limits.
  Scheduler(Executor& executor, const Settings& settings, Watch* watch = nullptr);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  std::int64_t rows() const;          // most answers that run at a time
  std::int64_t tokens() const;        // most tokens of a request, prompt and answer
  std::int64_t waiting() const;       // requests that wait for rows
  std::int64_t running() const;       // answers that hold rows
  double used() const;                // share of the cache's tokens that are in use
  std::int64_t prefix_bytes() const;  // memory of the entries of earlier prompts
  std::int64_t failures() const;      // consecutive requests that the engine failed
  bool idle() const;                  // no request waits or runs

  // Throws Error for a request that can never run: too many tokens, too many answers. Any thread may call it.
  void check(const Work& work) const;
  // Adds a checked request to the queue.
  void add(std::shared_ptr<Work> work);
  // Runs one step and delivers its tokens. Throws only when the process is in trouble, such as out of memory.
  void step();
  // Ends all requests, waiting and running.
  void end_all(const Failure& failure);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
