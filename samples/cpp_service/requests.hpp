// The bodies of requests, field by field as OpenAI's API has them, with the fields that vLLM and dynexport add.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "fields.hpp"
#include "json.hpp"

namespace service {

// A prompt: text, or token ids.
using Prompt = std::variant<std::string, Ids>;

// The fields that both kinds of completions have; one that is not given is none.
struct Generation {
  std::string model;                 // a served model's name, or name@depth
  std::optional<std::string> depth;  // a ratio as text, a name that the bundle declares, or "full"
  std::int64_t n = 1;                // number of answers
  bool stream = false;
  bool has_stream_options = false, include_usage = false;
  std::vector<std::string> stop;
  std::optional<double> temperature, top_p, presence_penalty, frequency_penalty, min_p, repetition_penalty;
  std::optional<std::int64_t> seed, max_tokens, top_k, min_tokens;
  std::map<std::string, double> logit_bias;
  Ids stop_token_ids;
};

struct CompletionBody : Generation {
  std::vector<Prompt> prompts;
  std::optional<std::int64_t> logprobs, best_of;
};

struct ChatBody : Generation {
  Json messages;
  std::optional<std::int64_t> max_completion_tokens, top_logprobs;
  bool logprobs = false;
  Json tools;      // a list, or null
  Json variables;  // of the chat template, an object
};

struct TokenizeBody {
  std::string model;
  std::optional<std::string> prompt;
  Json messages;  // a list, or null
  bool add_special_tokens = true;
};

struct DetokenizeBody {
  std::string model;
  Ids tokens;
};

// Each throws ApiError for the first field that is wrong.
CompletionBody completion_body(const Json& body);
ChatBody chat_body(const Json& body);
TokenizeBody tokenize_body(const Json& body);
DetokenizeBody detokenize_body(const Json& body);

}  // namespace service
