// Turns the bodies of requests into work for a model's worker.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/work.hpp"
#include "requests.hpp"
#include "served.hpp"

namespace service {

// A request for completions, ready to be submitted.
struct Asked {
  const Served* served = nullptr;
  std::string name;                                     // the model's name as the request gives it, for the answer
  std::vector<std::shared_ptr<dynexport::Work>> works;  // one per prompt
  std::int64_t n = 1;                                   // answers to each prompt
  bool stream = false;
  bool usage = false;  // whether the stream ends with the usage

  std::int64_t prompt_tokens() const;
};

// Returns what a request asks for; ``seconds`` is its time limit. Throws ApiError for a model or depth that does not
// exist, or fields that contradict each other; Error for a prompt or an option that the model refuses.
Asked asked_completion(const Directory& directory, const CompletionBody& body, std::optional<double> seconds);
Asked asked_chat(const Directory& directory, const ChatBody& body, std::optional<double> seconds);

// Returns the token ids of a conversation that ends with the opening of the assistant's turn.
Ids chat_tokens(const Served& served, const Json& messages, const Json& tools = nullptr,
                const Json& variables = Json::object());

}  // namespace service
