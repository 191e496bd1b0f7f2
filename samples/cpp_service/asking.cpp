#include "asking.hpp"

#include <algorithm>

#include "api_error.hpp"

namespace service {
namespace {

// OpenAI's default for text completions; a chat's answer may take all of the context.
constexpr std::int64_t kCompletionTokens = 16;
constexpr std::size_t kLongestId = 10, kShownId = 40;

std::int64_t token_id(const std::string& text) {
  const bool digits = std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (text.empty() || !digits || text.size() > kLongestId) {
    throw dynexport::Error("logit_bias: expected token ids, found " + dynexport::shown(beginning(text, kShownId)));
  }
  return std::stoll(text);
}

// Returns the author's options with those that the request gives in their place.
dynexport::Sampling sampling_of(const dynexport::Sampling& recommended, const Generation& body,
                                std::optional<std::int64_t> logprobs) {
  dynexport::Sampling sampling = recommended;
  sampling.temperature = body.temperature.value_or(sampling.temperature);
  sampling.top_p = body.top_p.value_or(sampling.top_p);
  sampling.presence_penalty = body.presence_penalty.value_or(sampling.presence_penalty);
  sampling.frequency_penalty = body.frequency_penalty.value_or(sampling.frequency_penalty);
  sampling.min_p = body.min_p.value_or(sampling.min_p);
  sampling.repetition_penalty = body.repetition_penalty.value_or(sampling.repetition_penalty);
  sampling.min_new_tokens = body.min_tokens.value_or(sampling.min_new_tokens);
  // -1 is vLLM's way to say all.
  sampling.top_k = std::max<std::int64_t>(0, body.top_k.value_or(sampling.top_k));
  if (body.seed) {
    if (*body.seed < 0) {
      throw dynexport::Error("seed: expected an integer >= 0, or none, found " + std::to_string(*body.seed));
    }
    sampling.seed = static_cast<std::uint64_t>(*body.seed);
  }
  for (const auto& [token, bias] : body.logit_bias) sampling.logit_bias[token_id(token)] = bias;
  sampling.logprobs = logprobs;
  return sampling;
}

struct Form {
  std::int64_t new_tokens;
  std::optional<std::int64_t> logprobs;
  bool chat;
};

std::shared_ptr<dynexport::Work> work_of(const Directory::Found& found, Ids ids, const Generation& body,
                                         const Form& form, std::optional<double> seconds) {
  const Served& served = *found.first;
  dynexport::Options options;
  options.max_new_tokens = form.new_tokens;
  options.sampling = sampling_of(served.recommended().sampling, body, form.logprobs);
  options.depth = found.second.name;
  options.stop = body.stop;
  if (served.model().tokenizer() != nullptr) {
    const std::vector<std::string>& authors = served.recommended().stop;
    options.stop.insert(options.stop.end(), authors.begin(), authors.end());
  }
  options.chat = form.chat;
  options.stop_token_ids = body.stop_token_ids;
  auto work = dynexport::make_work(served.model(), std::move(ids), options, body.n, seconds);
  served.worker().scheduler().check(*work);
  return work;
}

Asked asked_of(const Served& served, const Generation& body) {
  if (body.has_stream_options && !body.stream) {
    throw wrong_field("stream_options", "expected stream beside it, found none");
  }
  Asked asked;
  asked.served = &served;
  asked.name = body.model;
  asked.n = body.n;
  asked.stream = body.stream;
  asked.usage = body.include_usage;
  return asked;
}

// Returns a message whose text parts are one text, as most templates expect; other parts are refused.
Json with_text(std::size_t index, const Json& message) {
  const auto content = message.find("content");
  if (content == message.end() || !content->is_array()) return message;
  std::string text;
  for (const Json& part : *content) {
    const Json kind = part.is_object() && part.contains("type") ? part["type"] : Json(nullptr);
    const auto own = part.is_object() ? part.find("text") : part.end();
    if (kind != "text" || own == part.end() || !own->is_string()) {
      const std::string shown = kind.is_string() ? beginning(kind.get<std::string>(), kShownId) : "none";
      throw wrong_field("messages[" + std::to_string(index) + "].content",
                        "expected parts of type text, found " + shown);
    }
    text += (&part == &content->front() ? "" : "\n") + own->get<std::string>();
  }
  Json result = message;
  result["content"] = text;
  return result;
}

}  // namespace

std::int64_t Asked::prompt_tokens() const {
  std::int64_t sum = 0;
  for (const auto& work : works) sum += static_cast<std::int64_t>(work->prompt.size());
  return sum;
}

Asked asked_completion(const Directory& directory, const CompletionBody& body, std::optional<double> seconds) {
  const Directory::Found found = directory.find(body.model, body.depth);
  if (body.best_of && *body.best_of != body.n) {
    throw wrong_field("best_of",
                      "expected " + std::to_string(body.n) + ", as n, found " + std::to_string(*body.best_of));
  }
  Asked asked = asked_of(*found.first, body);
  const Form form{body.max_tokens.value_or(kCompletionTokens), body.logprobs, false};
  for (const Prompt& prompt : body.prompts) {
    const auto* text = std::get_if<std::string>(&prompt);
    Ids ids = text != nullptr ? found.first->model().encode(*text) : std::get<Ids>(prompt);
    asked.works.push_back(work_of(found, std::move(ids), body, form, seconds));
  }
  return asked;
}

Asked asked_chat(const Directory& directory, const ChatBody& body, std::optional<double> seconds) {
  const Directory::Found found = directory.find(body.model, body.depth);
  Ids ids = chat_tokens(*found.first, body.messages, body.tools, body.variables);
  if (body.max_tokens && body.max_completion_tokens && body.max_tokens != body.max_completion_tokens) {
    throw wrong_field("max_tokens", "expected " + std::to_string(*body.max_completion_tokens) +
                                        ", as max_completion_tokens, found " + std::to_string(*body.max_tokens));
  }
  if (body.top_logprobs && !body.logprobs) {
    throw wrong_field("top_logprobs", "expected logprobs beside it, found none");
  }
  Asked asked = asked_of(*found.first, body);
  const std::int64_t rest = std::max<std::int64_t>(1, found.first->tokens() - static_cast<std::int64_t>(ids.size()));
  const std::optional<std::int64_t> logprobs =
      body.logprobs ? std::optional(body.top_logprobs.value_or(0)) : std::nullopt;
  const Form form{body.max_completion_tokens.value_or(body.max_tokens.value_or(rest)), logprobs, true};
  asked.works.push_back(work_of(found, std::move(ids), body, form, seconds));
  return asked;
}

Ids chat_tokens(const Served& served, const Json& messages, const Json& tools, const Json& variables) {
  Json texts = Json::array();
  for (std::size_t index = 0; index < messages.size(); ++index) texts.push_back(with_text(index, messages[index]));
  Json all = variables;
  if (tools.is_array() && !tools.empty()) all["tools"] = tools;
  return served.model().chat(written(texts), written(all));
}

}  // namespace service
