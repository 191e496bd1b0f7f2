// Waits for the deliveries of requests.
#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include "dynexport/worker.hpp"
#include "serving/seconds.hpp"

namespace dynexport {

// Deliveries of some requests, from the worker's thread to another one.
struct Answers::Inbox {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Delivery> deliveries;
  bool closed = false;  // nobody waits: a delivery would keep its request, whose ``deliver`` keeps this
};

Answers::Answers(Worker& worker, std::vector<std::shared_ptr<Work>> works)
    : inbox_(std::make_shared<Inbox>()), works_(std::move(works)), left_(works_.size()) {
  for (const std::shared_ptr<Work>& work : works_) {
    work->deliver = [inbox = inbox_](Delivery delivery) {
      const std::lock_guard<std::mutex> lock(inbox->mutex);
      if (inbox->closed) return;
      inbox->deliveries.push_back(std::move(delivery));
      inbox->changed.notify_all();
    };
    try {
      worker.submit(work);
    } catch (...) {
      cancel();
      throw;
    }
  }
}

Answers::~Answers() { cancel(); }

void Answers::cancel() {
  for (const std::shared_ptr<Work>& work : works_) work->cancelled = true;
  const std::lock_guard<std::mutex> lock(inbox_->mutex);
  inbox_->closed = true;
  inbox_->deliveries.clear();
}

std::optional<Delivery> Answers::next() {
  bool timed_out = true;
  std::optional<Delivery> found;
  while (!found && timed_out) found = next(kLongestSeconds, timed_out);
  return found;
}

std::optional<Delivery> Answers::next(double seconds, bool& timed_out) {
  timed_out = false;
  if (left_ == 0) return std::nullopt;
  std::unique_lock<std::mutex> lock(inbox_->mutex);
  const auto any = [this] { return !inbox_->deliveries.empty(); };
  if (!inbox_->changed.wait_for(lock, duration_of(seconds), any)) {
    timed_out = true;
    return std::nullopt;
  }
  Delivery delivery = std::move(inbox_->deliveries.front());
  inbox_->deliveries.pop_front();
  if (delivery.done) --left_;
  return delivery;
}

}  // namespace dynexport
