// A submitted prompt with its answers, what is delivered for it, and what a scheduler reports.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dynexport/generator.hpp"
#include "dynexport/kv_cache.hpp"
#include "dynexport/request.hpp"

namespace dynexport {

using Clock = std::chrono::steady_clock;

// Most answers to one prompt.
constexpr std::int64_t kMostChoices = 128;

// Why a request ended without an answer: by the client, after its deadline, in the engine or the router, because the
// server stops.
enum class Reason { kCancelled, kTimeout, kFailed, kClosed };

// "cancelled", "timeout", "failed", "closed".
std::string_view name_of(Reason reason);

// The end of a request that has no answer, or not all of it.
struct Failure {
  Reason reason = Reason::kFailed;
  std::string message;  // one line for the client
};

struct Work;
struct Drafts;  // what is known of an answer for drafts

// What one step of the scheduler made for a request.
struct Delivery {
  std::shared_ptr<Work> work;
  std::vector<Piece> pieces;       // the new tokens, in order; Piece::row is the answer's index
  std::optional<Failure> failure;  // set if the request ended without the rest of its answers
  bool done = false;               // true for the last delivery
};

using Deliver = std::function<void(Delivery)>;

// A submitted prompt and its answers. Only ``cancelled`` may be used by other threads after its submission.
struct Work {
  std::vector<std::int64_t> prompt;
  std::vector<Request> requests;  // one per answer; they share one run of the prompt where the strategy allows it
  std::int64_t new_tokens = 0;    // most tokens of an answer
  Deliver deliver;                // called in the scheduler's thread; it must not block or throw
  std::optional<Clock::time_point> deadline;
  Clock::time_point arrived;
  std::atomic<bool> cancelled{false};  // set by any thread to end it at the next step
  std::int64_t reused = 0;  // prompt tokens whose entries came from earlier requests; set before the first token

  const Depth& depth() const { return requests.front().depth(); }
  // Tokens to reserve in the cache for all answers.
  std::int64_t reserved() const;
};

// Returns a request to submit, of n answers; ``seconds`` is its time limit, waiting included. Throws Error for
// an argument out of its range, and for a depth that the bundle does not declare: its path is not in that message.
std::shared_ptr<Work> make_work(const Generator& model, std::vector<std::int64_t> prompt, const Options& options,
                                std::int64_t n = 1, std::optional<double> seconds = std::nullopt,
                                Deliver deliver = nullptr);

// One answer of a running request, with its row in the cache.
struct Answer {
  std::shared_ptr<Work> work;
  Request* request = nullptr;  // of ``work``
  std::int64_t row = 0;
  std::int64_t done = 0;                   // number of the prompt's tokens that have run
  std::vector<std::int64_t> tokens;        // ids of the generated tokens; the last one has not run yet
  bool ready = false;                      // the prompt has run: decode steps may include it
  std::optional<std::string> chain;        // key of the last saved part of the row; none if the chain has ended
  std::int64_t saved = 0;                  // number of tokens in the saved parts
  std::vector<std::int64_t> entries;       // [places], number of entries of these tokens
  Clock::time_point latest;                // of the latest token
  std::shared_ptr<Drafts> drafts;          // null without speculation
  std::int64_t drafted = 0, accepted = 0;  // tokens that were drafted, and those of them that the model chose

  const Depth& depth() const { return request->depth(); }
  std::int64_t left() const { return static_cast<std::int64_t>(work->prompt.size()) - done; }
};

// Receives what a scheduler does, in the scheduler's thread; methods must be fast and must not throw. The defaults
// ignore it.
class Watch {
 public:
  Watch() = default;
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  virtual ~Watch() = default;
  // A request got its rows, ``waited`` seconds after it was submitted.
  virtual void started(const Work& work, double waited) { (void)work, (void)waited; }
  // A call ran: some tokens of a prompt, or a decode step of some rows; ``seconds`` is the executor's time.
  virtual void ran(std::int64_t prompt_tokens, std::int64_t rows, double seconds) {
    (void)prompt_tokens, (void)rows, (void)seconds;
  }
  // An answer got a token, ``gap`` seconds after its latest one, or after the submission for the first.
  virtual void answered(const Answer& answer, double gap, bool first) { (void)answer, (void)gap, (void)first; }
  // An answer ended: "stop", "length" or a Reason's name; ``decided`` is what its routers decided, call by call.
  virtual void ended(const Answer& answer, std::string_view reason, const std::vector<Decisions>& decided,
                     std::int64_t overflow) {
    (void)answer, (void)reason, (void)decided, (void)overflow;
  }
  // A request ended before it got rows; ``ended`` is not called for its answers.
  virtual void dropped(const Work& work, Reason reason) { (void)work, (void)reason; }
  // A request found the queue full; called in the thread that submitted it.
  virtual void refused() {}
  // A step ended; ``seconds`` is its whole time, the executor's included.
  virtual void stepped(double seconds) { (void)seconds; }
};

}  // namespace dynexport
