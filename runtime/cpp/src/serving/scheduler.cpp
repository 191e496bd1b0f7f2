// Which requests start, and how they end.
#include "dynexport/scheduler.hpp"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "execution/checks.hpp"
#include "serving/scheduler_state.hpp"
#include "serving/seconds.hpp"

namespace dynexport {
namespace {

// Above every cache, so that products with a number of tokens do not overflow.
constexpr std::int64_t kMostRows = std::int64_t{1} << 31;

std::int64_t length_of(const Work& work) { return static_cast<std::int64_t>(work.prompt.size()); }

// The rows that the engines allow.
std::int64_t rows_of(const Executor& executor, const Settings& settings) {
  settings.check();
  const std::optional<std::int64_t>& limit = executor.limits().rows;
  return limit ? std::min(settings.rows, *limit) : settings.rows;
}

}  // namespace

void Settings::check() const {
  checked_count("rows", rows, 1, kMostRows);
  checked_count("chunk", chunk);
  checked_count("queue", queue);
  if (tokens) checked_count("tokens", *tokens);
  if (reserved) checked_count("reserved", *reserved);
  checked_count("prefix_bytes", prefix_bytes, 0);
  if (speculation) speculation->check();
}

Scheduler::State::State(Executor& its, const Settings& sizes, Watch* its_watch)
    : State(its, sizes, its_watch, rows_of(its, sizes)) {}

Scheduler::State::State(Executor& its, const Settings& sizes, Watch* its_watch, std::int64_t most_rows)
    : settings(sizes),
      tokens(std::min(sizes.tokens.value_or(its.manifest().model.max_length), its.manifest().model.max_length)),
      rows(most_rows),
      watch(its_watch == nullptr ? ignored : *its_watch),
      executor(its),
      chunks{std::min(sizes.chunk, its.limits().prompt.value_or(sizes.chunk)), true},
      reserved(sizes.reserved.value_or(most_rows * tokens)),
      shared(!its.limits().whole_prompts && !its.limits().compete),
      alone(its.limits().compete) {
  const std::optional<std::int64_t>& limit = its.limits().rows;
  const bool spare = !limit || rows < *limit;  // one more row to exchange two others
  cache = its.cache(rows + (spare ? 1 : 0), tokens, its.decision_rows() > 0);
  if (sizes.prefix_bytes > 0 && shared) prefixes.emplace(static_cast<std::size_t>(sizes.prefix_bytes));
  if (sizes.speculation) speculator.emplace(its, *sizes.speculation);
}

void Scheduler::State::check(const Work& work) const {
  const Limits& limits = executor.limits();
  if (work.requests.empty() || work.prompt.empty()) throw Error("prompt: expected at least one token, found none");
  if (limits.whole_prompts && limits.prompt && length_of(work) > *limits.prompt) {
    throw Error("prompt: expected at most " + std::to_string(*limits.prompt) +
                " tokens, as prompts of this model are never cut, found " + std::to_string(length_of(work)));
  }
  const auto answers = static_cast<std::int64_t>(work.requests.size());
  if (answers > rows) {
    throw Error("n: expected at most " + std::to_string(rows) + " answers, found " + std::to_string(answers));
  }
  if (work.reserved() / answers > tokens || work.reserved() > reserved) {
    throw Error("prompt: expected at most " + std::to_string(std::min(tokens, reserved / answers)) +
                " tokens together with the answer, found " + std::to_string(length_of(work)) + " and " +
                std::to_string(work.new_tokens) + " new ones");
  }
}

void Scheduler::State::add(WorkPtr work) {
  waiting.push_back(std::move(work));
  count();
}

std::vector<Scheduler::State::WorkPtr> Scheduler::State::running_works() const {
  std::vector<WorkPtr> works;
  for (const AnswerPtr& answer : running) {
    if (std::find(works.begin(), works.end(), answer->work) == works.end()) works.push_back(answer->work);
  }
  return works;
}

std::vector<Scheduler::State::WorkPtr> Scheduler::State::works() const {
  std::vector<WorkPtr> all(waiting.begin(), waiting.end());
  const std::vector<WorkPtr> others = running_works();
  all.insert(all.end(), others.begin(), others.end());
  return all;
}

void Scheduler::State::end_unwanted() {
  const Clock::time_point now = Clock::now();
  for (const WorkPtr& work : works()) {
    if (work->cancelled) {
      end_work(work, {Reason::kCancelled, "the client has cancelled the request"});
    } else if (work->deadline && now >= *work->deadline) {
      end_work(work, {Reason::kTimeout, "the request reached its time limit"});
    }
  }
}

// Starts waiting requests in order of arrival, while rows and reserved tokens last.
void Scheduler::State::admit() {
  while (!waiting.empty()) {
    const WorkPtr work = waiting.front();
    std::int64_t held = 0;
    for (const WorkPtr& other : running_works()) held += other->reserved();
    const auto answers = static_cast<std::int64_t>(work->requests.size());
    if (static_cast<std::int64_t>(running.size()) + answers > rows || held + work->reserved() > reserved) return;
    waiting.pop_front();
    const std::vector<std::int64_t> acquired = cache->acquire(answers);
    const std::size_t first = running.size();
    for (std::size_t place = 0; place < acquired.size(); ++place) {
      const AnswerPtr answer = running.emplace_back(std::make_shared<Answer>());
      answer->work = work;
      answer->request = &work->requests[place];
      answer->row = acquired[place];
      answer->entries = cache->lengths(answer->row);
      if (prefixes) answer->chain = PrefixStore::root(work->depth().prompt);
    }
    reuse(*running[first]);
    watch.started(*work, seconds_between(work->arrived, Clock::now()));
  }
}

// Copies the entries of the longest known prefix into an answer's row.
void Scheduler::State::reuse(Answer& answer) {
  if (!prefixes) return;
  for (const auto& [key, saved] : prefixes->longest(*answer.chain, answer.work->prompt, chunks)) {
    cache->restore(answer.row, *saved);
    answer.chain = key;
  }
  answer.done = answer.saved = answer.work->reused = cache->position(answer.row);
  answer.entries = cache->lengths(answer.row);
}

// Ends a request without the rest of its answers.
void Scheduler::State::end_work(const WorkPtr& work, const Failure& failure) {
  const auto place = std::find(waiting.begin(), waiting.end(), work);
  if (place != waiting.end()) {
    watch.dropped(*work, failure.reason);
    waiting.erase(place);
  }
  const AnswerGroup answers = running;
  for (const AnswerPtr& answer : answers) {
    if (answer->work == work) release(answer, name_of(failure.reason));
  }
  Delivery& delivery = delivery_of(work);
  delivery.failure = failure;
  delivery.done = true;
}

// Ends a request that failed. A route that the contract forbids is not the engine's failure.
void Scheduler::State::fail(const Answer& answer, const Error& error, bool by_engine) {
  if (by_engine && dynamic_cast<const RouteError*>(&error) == nullptr) ++gauges.failures;
  const WorkPtr work = answer.work;
  end_work(work, {Reason::kFailed, error.what()});
}

void Scheduler::State::release(const AnswerPtr& answer, std::string_view reason) {
  const std::vector<std::int64_t> counters = cache->mark(answer->row).overflow;
  const std::int64_t overflow = std::accumulate(counters.begin(), counters.end(), std::int64_t{0});
  watch.ended(*answer, reason, cache->log(answer->row), overflow);
  const std::int64_t row = answer->row;
  running.erase(std::find(running.begin(), running.end(), answer));
  cache->release(row);
}

bool Scheduler::State::runs(const AnswerPtr& answer) const {
  return std::find(running.begin(), running.end(), answer) != running.end();
}

Delivery& Scheduler::State::delivery_of(const WorkPtr& work) {
  const auto [found, is_new] = out_places.try_emplace(work.get(), out.size());
  if (is_new) out.emplace_back().work = work;
  return out[found->second];
}

void Scheduler::State::deliver() {
  count();
  std::vector<Delivery> made;
  made.swap(out);
  out_places.clear();
  for (Delivery& delivery : made) {
    const WorkPtr work = delivery.work;
    if (work->deliver) work->deliver(std::move(delivery));
  }
}

void Scheduler::State::count() {
  std::int64_t positions = 0;
  for (const AnswerPtr& answer : running) positions += cache->position(answer->row);
  gauges.waiting = static_cast<std::int64_t>(waiting.size());
  gauges.running = static_cast<std::int64_t>(running.size());
  gauges.used = static_cast<double>(positions) / (static_cast<double>(rows) * static_cast<double>(tokens));
  gauges.prefix_bytes = prefixes ? static_cast<std::int64_t>(prefixes->bytes()) : 0;
}

Scheduler::Scheduler(Executor& executor, const Settings& settings, Watch* watch)
    : state_(std::make_unique<State>(executor, settings, watch)) {}

Scheduler::~Scheduler() = default;

std::int64_t Scheduler::rows() const { return state_->rows; }
std::int64_t Scheduler::tokens() const { return state_->tokens; }
std::int64_t Scheduler::waiting() const { return state_->gauges.waiting; }
std::int64_t Scheduler::running() const { return state_->gauges.running; }
double Scheduler::used() const { return state_->gauges.used; }
std::int64_t Scheduler::prefix_bytes() const { return state_->gauges.prefix_bytes; }
std::int64_t Scheduler::failures() const { return state_->gauges.failures; }
bool Scheduler::idle() const { return waiting() == 0 && running() == 0; }

void Scheduler::check(const Work& work) const { state_->check(work); }
void Scheduler::add(std::shared_ptr<Work> work) { state_->add(std::move(work)); }

void Scheduler::step() {
  const Clock::time_point begun = Clock::now();
  state_->end_unwanted();
  state_->admit();
  state_->run_prompt();
  state_->decode();
  state_->deliver();
  state_->watch.stepped(seconds_between(begun, Clock::now()));
}

void Scheduler::end_all(const Failure& failure) {
  for (const std::shared_ptr<Work>& work : state_->works()) state_->end_work(work, failure);
  state_->deliver();
}

}  // namespace dynexport
