#include "delivering.hpp"

#include <memory>
#include <optional>
#include <utility>

#include "api_error.hpp"
#include "dynexport/worker.hpp"

namespace service {
namespace {

// Seconds between two looks at whether the client has hung up while nothing is delivered.
constexpr double kLook = 0.05;
constexpr int kHungUp = 499;  // nobody reads it

// Waits for a delivery. Returns none if the client has hung up, or after the last one.
std::optional<dynexport::Delivery> next(dynexport::Answers& answers, const Connection& connection) {
  while (!connection.gone()) {
    bool timed_out = false;
    auto delivery = answers.next(kLook, timed_out);
    if (!timed_out) return delivery;
  }
  return std::nullopt;
}

// A stream of events that the connection's thread writes, one delivery at a time.
class Stream {
 public:
  Stream(Answer answer, std::unique_ptr<dynexport::Answers> answers, dynexport::Delivery first,
         const Connection& connection)
      : answer_(std::move(answer)), answers_(std::move(answers)), next_(std::move(first)), connection_(connection) {}

  // Writes the events of a delivery, and waits for the next one. Returns false to cut the stream off.
  bool write(httplib::DataSink& sink) {
    if (!next_) return false;  // the client has hung up
    std::string events = std::exchange(opened_, true) ? "" : answer_.opening();
    events += answer_.events(*next_);
    const bool failed = next_->failure.has_value();
    left_ -= next_->done ? 1 : 0;
    if (failed) {
      events += event(of_failure(*next_->failure).body());
    } else if (left_ == 0) {
      events += answer_.closing();
    }
    if (!events.empty() && !sink.write(events.data(), events.size())) return false;
    if (failed || left_ == 0) {
      sink.done();
    } else {
      next_ = next(*answers_, connection_);
    }
    return true;
  }

 private:
  Answer answer_;
  std::unique_ptr<dynexport::Answers> answers_;
  std::optional<dynexport::Delivery> next_;
  const Connection& connection_;
  std::size_t left_ = answer_.asked().works.size();  // requests that have not ended
  bool opened_ = false;
};

// Sends a stream when its first token is there: a request that fails before has a status, not an event.
void stream(Exchange& exchange, Answer answer, std::unique_ptr<dynexport::Answers> answers) {
  auto first = next(*answers, exchange.connection());
  if (!first) {
    exchange.response().status = kHungUp;
    return;
  }
  if (first->failure) throw of_failure(*first->failure);
  auto stream =
      std::make_shared<Stream>(std::move(answer), std::move(answers), std::move(*first), exchange.connection());
  exchange.response().set_chunked_content_provider(
      "text/event-stream", [stream](std::size_t, httplib::DataSink& sink) { return stream->write(sink); });
}

void whole(Exchange& exchange, Answer answer, dynexport::Answers& answers) {
  std::size_t left = answer.asked().works.size();
  while (left != 0) {
    const auto delivery = next(answers, exchange.connection());
    if (!delivery) {
      exchange.response().status = kHungUp;
      return;
    }
    if (delivery->failure) throw of_failure(*delivery->failure);
    answer.add(*delivery);
    left -= delivery->done ? 1 : 0;
  }
  exchange.response().status = 200;
  exchange.response().set_content(written(answer.body()), "application/json");
}

}  // namespace

void deliver(Exchange& exchange, Answer answer) {
  auto answers = std::make_unique<dynexport::Answers>(answer.asked().served->worker(), answer.asked().works);
  if (answer.asked().stream) {
    stream(exchange, std::move(answer), std::move(answers));
  } else {
    whole(exchange, std::move(answer), *answers);
  }
}

}  // namespace service
