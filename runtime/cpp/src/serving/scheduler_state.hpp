// The state of a scheduler, and the parts of a step.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "dynexport/scheduler.hpp"
#include "generation/speculation.hpp"
#include "serving/prefix_store.hpp"
#include "serving/rows.hpp"

namespace dynexport {

// What other threads may read of a scheduler.
struct Gauges {
  std::atomic<std::int64_t> waiting{0}, running{0}, prefix_bytes{0}, failures{0};
  std::atomic<double> used{0.0};
};

struct Drafts {
  KnownTokens known;
  Acceptance acceptance;
};

struct Scheduler::State {
  using AnswerPtr = std::shared_ptr<Answer>;
  using WorkPtr = std::shared_ptr<Work>;

  State(Executor& executor, const Settings& settings, Watch* watch);

  // Starting and ending (scheduler.cpp)
  void check(const Work& work) const;
  void add(WorkPtr work);
  void end_unwanted();
  void admit();
  std::vector<WorkPtr> works() const;  // waiting and running
  void end_work(const WorkPtr& work, const Failure& failure);
  void deliver();

  // Prompts and decode steps (steps.cpp)
  void run_prompt();
  void decode();

 private:
  State(Executor& executor, const Settings& settings, Watch* watch, std::int64_t rows);

  std::vector<WorkPtr> running_works() const;
  void reuse(Answer& answer);
  void fail(const Answer& answer, const Error& error, bool by_engine = true);
  void release(const AnswerPtr& answer, std::string_view reason);
  bool runs(const AnswerPtr& answer) const;
  Delivery& delivery_of(const WorkPtr& work);
  void count();

  AnswerPtr next_prompt();
  std::vector<AnswerPtr> starting() const;
  // Returns the logits of a chunk's last token if it is the prompt's last chunk.
  std::vector<float> timed_prompt(const Answer& answer, std::int64_t stop, bool last);
  // Copies a row whose prompt has run to the other answers of its request. Returns all of them.
  AnswerGroup with_copies(const AnswerPtr& answer);
  // The answers that get a token, by depth.
  std::vector<AnswerGroup> groups() const;
  void decode_rows(const AnswerGroup& answers);
  // A decode step with drafts, and one without. Return the executor's seconds; throw as Executor::run.
  double step_with_drafts(const AnswerGroup& answers, Rows& stepped);
  double step_without(const AnswerGroup& answers, Rows& stepped);
  // Lets an answer take the next token, from logits float32 [vocab].
  SpeculatedRow taken(const AnswerPtr& answer, const float* logits);
  // Delivers the tokens that an answer has taken, and ends it if it is complete.
  void push(const AnswerPtr& answer, SpeculatedRow& row, Clock::time_point now);
  void save(Answer& answer);

 public:
  const Settings settings;
  const std::int64_t tokens, rows;
  Watch ignored;
  Watch& watch;
  Gauges gauges;

 private:
  Executor& executor;
  const Chunks chunks;
  const std::int64_t reserved;
  const bool shared, alone;  // whether a prefix may be copied; whether a row's tokens must not depend on the others
  std::unique_ptr<KvCache> cache;
  std::optional<PrefixStore> prefixes;
  std::optional<Speculator> speculator;
  std::deque<WorkPtr> waiting;
  AnswerGroup running;
  std::int64_t turn = 0;
  // What this step made, in order, and each request's place there.
  std::vector<Delivery> out;
  std::unordered_map<const Work*, std::size_t> out_places;
};

}  // namespace dynexport
