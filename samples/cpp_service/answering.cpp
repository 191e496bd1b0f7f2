#include "answering.hpp"

#include <algorithm>
#include <array>
#include <ctime>
#include <random>

namespace service {
namespace {

constexpr double kLeastLogprob = -9999.0;

// Returns 32 random hexadecimal digits.
std::string random_name() {
  static thread_local std::mt19937_64 generator{std::random_device{}()};
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string name;
  for (int half = 0; half < 2; ++half) {
    std::uint64_t bits = generator();
    for (int digit = 0; digit < 16; ++digit, bits >>= 4U) name += kDigits[bits & 0xFU];
  }
  return name;
}

// Returns the number of characters of a UTF-8 text.
std::int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; });
}

Json stop_reason_of(const dynexport::StopReason& reason) {
  if (const auto* id = std::get_if<std::int64_t>(&reason)) return *id;
  if (const auto* text = std::get_if<std::string>(&reason)) return *text;
  return nullptr;
}

}  // namespace

std::string event(const Json& content) { return "data: " + written(content) + "\n\n"; }

Answer::Answer(Kind kind, Asked asked) : kind_(kind), asked_(std::move(asked)) {
  const bool chat = kind == Kind::kChat;
  const std::string chat_object = asked_.stream ? "chat.completion.chunk" : "chat.completion";
  head_ = {{"id", (chat ? "chatcmpl-" : "cmpl-") + random_name()},
           {"object", chat ? chat_object : "text_completion"},
           {"created", static_cast<std::int64_t>(std::time(nullptr))},
           {"model", asked_.name}};
  choices_.resize(asked_.works.size() * static_cast<std::size_t>(asked_.n));
  for (std::size_t index = 0; index < choices_.size(); ++index) choices_[index].index = index;
}

std::vector<Answer::Choice> Answer::choices_of(const dynexport::Delivery& delivery) {
  const auto work = std::find(asked_.works.begin(), asked_.works.end(), delivery.work) - asked_.works.begin();
  std::vector<Choice> found;
  for (const dynexport::Piece& piece : delivery.pieces) {
    ++generated_;
    const auto index = static_cast<std::size_t>(work * asked_.n + piece.row);
    auto choice = std::find_if(found.begin(), found.end(), [index](const Choice& one) { return one.index == index; });
    if (choice == found.end()) {
      choice = found.emplace(found.end());
      choice->index = index;
    }
    choice->text += piece.text;
    choice->layers.push_back(piece.layers);
    if (piece.logprobs) choice->logprobs.push_back(logprob_of(piece));
    choice->finish_reason = piece.finish ? Json(std::string(dynexport::name_of(*piece.finish))) : Json(nullptr);
    choice->stop_reason = stop_reason_of(piece.stop_reason);
  }
  return found;
}

void Answer::add(const dynexport::Delivery& delivery) {
  for (const Choice& part : choices_of(delivery)) {
    Choice& choice = choices_.at(part.index);
    choice.text += part.text;
    for (const Json& layers : part.layers) choice.layers.push_back(layers);
    for (const Json& logprob : part.logprobs) choice.logprobs.push_back(logprob);
    choice.finish_reason = part.finish_reason;
    choice.stop_reason = part.stop_reason;
  }
}

Json Answer::entry(const Choice& choice) const {
  return {{"index", choice.index},
          {"finish_reason", choice.finish_reason},
          {"stop_reason", choice.stop_reason},
          {"layers", choice.layers}};
}

Json Answer::body() const {
  Json choices = Json::array();
  for (const Choice& choice : choices_) {
    Json one = entry(choice);
    if (kind_ == Kind::kChat) {
      one["message"] = {{"role", "assistant"}, {"content", choice.text}, {"refusal", nullptr}};
    } else {
      one["text"] = choice.text;
    }
    one["logprobs"] = logprobs_written(choice.logprobs);
    choices.push_back(std::move(one));
  }
  Json result = with_head(std::move(choices));
  result["usage"] = usage();
  return result;
}

std::string Answer::opening() const {
  std::string events;
  if (kind_ != Kind::kChat) return events;
  for (const Choice& choice : choices_) {
    const Json delta = {{"role", "assistant"}, {"content", ""}, {"refusal", nullptr}};
    const Json one = {{"index", choice.index}, {"delta", delta}, {"finish_reason", nullptr}, {"logprobs", nullptr}};
    events += event(with_head(Json::array({one})));
  }
  return events;
}

std::string Answer::events(const dynexport::Delivery& delivery) {
  std::string events;
  for (const Choice& choice : choices_of(delivery)) {
    Json one = entry(choice);
    if (kind_ == Kind::kChat) {
      one["delta"] = {{"content", choice.text}};
    } else {
      one["text"] = choice.text;
    }
    one["logprobs"] = logprobs_written(choice.logprobs);
    events += event(with_head(Json::array({one})));
  }
  return events;
}

std::string Answer::closing() const {
  std::string events;
  if (asked_.usage) {
    Json last = with_head(Json::array());
    last["usage"] = usage();
    events = event(last);
  }
  return events + "data: [DONE]\n\n";
}

Json Answer::with_head(Json choices) const {
  Json result = head_;
  result["choices"] = std::move(choices);
  return result;
}

Json Answer::usage() const {
  const std::int64_t prompt = asked_.prompt_tokens();
  std::int64_t reused = 0;
  for (const auto& work : asked_.works) reused += work->reused;
  return {{"prompt_tokens", prompt},
          {"completion_tokens", generated_},
          {"total_tokens", prompt + generated_},
          {"prompt_tokens_details", {{"cached_tokens", reused}}}};
}

Json Answer::token(std::int64_t id, double logprob) const {
  const auto& tokenizer = asked_.served->model().tokenizer();
  const std::string shown = tokenizer == nullptr ? std::to_string(id) : tokenizer->decode({id}, false);
  Json bytes = Json::array();
  for (const char one : shown) bytes.push_back(static_cast<unsigned char>(one));
  return {{"token", shown}, {"logprob", std::max(logprob, kLeastLogprob)}, {"bytes", bytes}};
}

Json Answer::logprob_of(const dynexport::Piece& piece) const {
  Json result = token(piece.token, piece.logprobs->logprob);
  Json top = Json::array();
  for (const auto& [id, logprob] : piece.logprobs->top) top.push_back(token(id, logprob));
  result["top_logprobs"] = std::move(top);
  return result;
}

Json Answer::logprobs_written(const Json& found) const {
  if (found.empty()) return nullptr;
  if (kind_ == Kind::kChat) return {{"content", found}, {"refusal", nullptr}};
  Json tokens = Json::array(), own = Json::array(), tops = Json::array(), offsets = Json::array();
  std::int64_t length = 0;
  for (const Json& one : found) {
    tokens.push_back(one["token"]);
    own.push_back(one["logprob"]);
    Json top = Json::object();
    for (const Json& other : one["top_logprobs"]) top[other["token"].get<std::string>()] = other["logprob"];
    tops.push_back(std::move(top));
    offsets.push_back(length);
    length += characters(one["token"].get<std::string>());
  }
  return {{"tokens", tokens}, {"token_logprobs", own}, {"top_logprobs", tops}, {"text_offset", offsets}};
}

}  // namespace service
