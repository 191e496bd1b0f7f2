// The thread that runs a scheduler, and the way for other threads to submit requests to it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/error.hpp"
#include "dynexport/generator.hpp"
#include "dynexport/scheduler.hpp"
#include "dynexport/work.hpp"

namespace dynexport {

// A request was refused because as many as may wait are waiting.
class QueueFull : public Error {
 public:
  using Error::Error;
};

// A request was refused because the server stops.
class Closed : public Error {
 public:
  using Error::Error;
};

// Runs the requests of one model in a thread of its own. Any thread may call its methods.
class Worker {
 public:
  // ``watch`` must live longer; ``on_failure`` receives one line when the thread ends by an error. Throws as Scheduler.
  Worker(std::shared_ptr<Generator> model, const Settings& settings, Watch* watch = nullptr,
         std::function<void(const std::string&)> on_failure = nullptr);
  // Closes it without waiting for requests.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  Generator& model() const;
  const Settings& settings() const;
  const Scheduler& scheduler() const;

  void start();
  // One line that says why the worker is not ready; empty if it is.
  std::string problem() const;
  // Whether the thread has ended by an error: only another process can serve the model.
  bool dead() const;
  // Number of requests that wait for rows.
  std::int64_t waiting() const;
  // Queues a request; its deliveries come in the worker's thread. Throws QueueFull, Closed, or Error for a request
  // that can never run.
  void submit(std::shared_ptr<Work> work);
  // Refuses further requests, lets the others finish for some seconds, then ends them and the thread.
  void close(double seconds = 0.0);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Submits requests and hands out their deliveries as they come, to one thread; when it goes, it cancels them.
class Answers {
 public:
  // Replaces the requests' ``deliver``. Throws as Worker::submit.
  Answers(Worker& worker, std::vector<std::shared_ptr<Work>> works);
  ~Answers();
  Answers(const Answers&) = delete;
  Answers& operator=(const Answers&) = delete;

  // Waits for the next delivery; none after the last one of all requests.
  std::optional<Delivery> next();
  // As next, but waits for some seconds at most; ``timed_out`` tells whether they passed.
  std::optional<Delivery> next(double seconds, bool& timed_out);

 private:
  struct Inbox;
  void cancel();

  std::shared_ptr<Inbox> inbox_;
  std::vector<std::shared_ptr<Work>> works_;
  std::size_t left_;
};

}  // namespace dynexport
