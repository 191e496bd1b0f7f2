// The worker's thread and its inbox.
#include "dynexport/worker.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "serving/seconds.hpp"

namespace dynexport {
namespace {

// Consecutive failures of the engine after which a worker is not ready.
constexpr std::int64_t kFailures = 3;
constexpr const char* kStops = "the server stops";

Failure closing_failure() { return {Reason::kClosed, kStops}; }

}  // namespace

struct Worker::State {
  using WorkPtr = std::shared_ptr<Work>;

  State(std::shared_ptr<Generator> its, const Settings& sizes, Watch* its_watch,
        std::function<void(const std::string&)> told)
      : model(std::move(its)),
        settings(sizes),
        watch(its_watch),
        on_failure(std::move(told)),
        scheduler(model->executor(), sizes, its_watch) {}

  void run();
  bool ends();
  void receive();
  void end(const Failure& failure);
  void stop(const std::string& message);

  std::shared_ptr<Generator> model;
  const Settings settings;
  Watch* watch;
  std::function<void(const std::string&)> on_failure;
  Scheduler scheduler;  // used by the thread; its numbers by all
  std::thread thread;
  std::mutex closer;  // of close(), which several threads may call

  mutable std::mutex mutex;  // of what follows
  std::condition_variable changed;
  std::deque<WorkPtr> inbox;
  std::string problem;  // why the thread ended by an error
  bool started = false, closing = false, stopped = false;
  std::optional<Clock::time_point> deadline;  // after which a closing worker ends its requests
};

void Worker::State::run() {
  Failure last = closing_failure();
  try {
    while (!ends()) {
      receive();
      scheduler.step();
    }
  } catch (const std::exception& error) {  // the thread's last words; requests must not hang
    last = {Reason::kFailed, model->bundle().path().string() + ": the worker stopped: " + error.what()};
  } catch (...) {
    last = {Reason::kFailed, model->bundle().path().string() + ": the worker stopped: unknown error"};
  }
  if (last.reason == Reason::kFailed) {
    last.message = one_line(last.message);
    stop(last.message);
  }
  end(last);
}

void Worker::State::stop(const std::string& message) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    problem = message;
  }
  if (on_failure) on_failure(message);
}

// Whether the thread was told to end, and nothing is left or its time is over.
bool Worker::State::ends() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!closing) return false;
  return (scheduler.idle() && inbox.empty()) || (deadline && Clock::now() >= *deadline);
}

// Takes all submitted requests; waits for one if nothing runs.
void Worker::State::receive() {
  std::unique_lock<std::mutex> lock(mutex);
  if (scheduler.idle()) changed.wait(lock, [this] { return !inbox.empty() || closing; });
  for (WorkPtr& work : inbox) scheduler.add(std::move(work));
  inbox.clear();
}

void Worker::State::end(const Failure& failure) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    closing = true;
    for (WorkPtr& work : inbox) scheduler.add(std::move(work));
    inbox.clear();
  }
  scheduler.end_all(failure);
  const std::lock_guard<std::mutex> lock(mutex);
  stopped = true;
  changed.notify_all();
}

Worker::Worker(std::shared_ptr<Generator> model, const Settings& settings, Watch* watch,
               std::function<void(const std::string&)> on_failure)
    : state_(std::make_unique<State>(std::move(model), settings, watch, std::move(on_failure))) {}

Worker::~Worker() { close(); }

Generator& Worker::model() const { return *state_->model; }
const Settings& Worker::settings() const { return state_->settings; }
const Scheduler& Worker::scheduler() const { return state_->scheduler; }

void Worker::start() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->started || state_->closing) throw Error("worker: expected one that was not started, found it started");
  state_->thread = std::thread([state = state_.get()] { state->run(); });
  state_->started = true;
}

std::string Worker::problem() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->problem.empty()) return state_->problem;
  if (state_->closing) return kStops;
  const std::int64_t failures = state_->scheduler.failures();
  if (failures >= kFailures) return "the last " + std::to_string(failures) + " requests failed";
  return state_->started ? "" : "the worker has not started";
}

bool Worker::dead() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return !state_->problem.empty();
}

std::int64_t Worker::waiting() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return static_cast<std::int64_t>(state_->inbox.size()) + state_->scheduler.waiting();
}

void Worker::submit(std::shared_ptr<Work> work) {
  state_->scheduler.check(*work);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->closing || !state_->problem.empty()) {
    throw Closed(state_->problem.empty() ? "server: expected a running one, found it stopping; try another one"
                                         : state_->problem);
  }
  const std::int64_t most = state_->settings.queue;
  if (static_cast<std::int64_t>(state_->inbox.size()) + state_->scheduler.waiting() >= most) {
    if (state_->watch != nullptr) state_->watch->refused();
    throw QueueFull("queue: expected fewer than " + std::to_string(most) + " waiting requests, found it full");
  }
  work->arrived = Clock::now();
  state_->inbox.push_back(std::move(work));
  state_->changed.notify_all();
}

void Worker::close(double seconds) {
  {
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->closing = true;
    state_->changed.notify_all();
    if (state_->started) {
      state_->changed.wait_for(lock, duration_of(seconds), [this] { return state_->stopped; });
      state_->deadline = Clock::now();
    }
  }
  const std::lock_guard<std::mutex> lock(state_->closer);
  if (state_->thread.joinable()) {
    state_->thread.join();
  } else {
    state_->end(closing_failure());  // it has not started
  }
}

}  // namespace dynexport
