// Turns deliveries into the bodies of answers and the events of streams, as OpenAI's API has them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "asking.hpp"
#include "dynexport/work.hpp"
#include "json.hpp"

namespace service {

enum class Kind { kCompletion, kChat };

// Returns a server-sent event with a JSON text.
std::string event(const Json& content);

// The answer to a request, made from what its worker delivers.
class Answer {
 public:
  Answer(Kind kind, Asked asked);

  const Asked& asked() const { return asked_; }

  // Adds what was delivered, for a whole answer.
  void add(const dynexport::Delivery& delivery);
  // The body of the whole answer.
  Json body() const;

  // The events before the first token, those of what was delivered (one per answer that has new tokens), and those
  // after the last token.
  std::string opening() const;
  std::string events(const dynexport::Delivery& delivery);
  std::string closing() const;

 private:
  // One answer so far, or what was delivered for it.
  struct Choice {
    std::size_t index = 0;
    std::string text;
    Json layers = Json::array(), logprobs = Json::array();
    Json finish_reason, stop_reason;
  };

  std::vector<Choice> choices_of(const dynexport::Delivery& delivery);
  Json entry(const Choice& choice) const;
  Json usage() const;
  Json with_head(Json choices) const;
  Json logprob_of(const dynexport::Piece& piece) const;
  Json token(std::int64_t id, double logprob) const;
  Json logprobs_written(const Json& found) const;

  Kind kind_;
  Asked asked_;
  Json head_;
  std::vector<Choice> choices_;
  std::int64_t generated_ = 0;
};

}  // namespace service
