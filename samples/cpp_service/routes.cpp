#include "routes.hpp"

#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <typeinfo>

#include "api_error.hpp"
#include "delivering.hpp"
#include "keys.hpp"
#include "requests.hpp"

namespace service {
namespace {

constexpr const char* kJson = "application/json";
constexpr const char* kModels = "/v1/models";

// Paths that are answered without a key and however many requests run: probes and monitoring.
bool is_watched(const std::string& path) { return path == "/health" || path == "/ready" || path == "/metrics"; }

void answer(Exchange& exchange, const Json& content, int status = 200) {
  exchange.response().status = status;
  exchange.response().set_content(written(content), kJson);
}

void answer(Exchange& exchange, const ApiError& error) {
  for (const auto& [name, value] : error.headers()) exchange.response().set_header(name.c_str(), value);
  answer(exchange, error.body(), error.status());
}

// Whether the header Content-Type says JSON, or nothing.
bool says_json(std::string type) {
  type.erase(std::min(type.find(';'), type.size()));
  type.erase(type.find_last_not_of(" \t") + 1);
  for (char& one : type) one = static_cast<char>(std::tolower(static_cast<unsigned char>(one)));
  const bool suffixed =
      type.rfind("application/", 0) == 0 && type.size() > 5 && type.substr(type.size() - 5) == "+json";
  return type.empty() || type == kJson || suffixed;
}

std::string name_of(const std::exception& error) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(typeid(error).name(), nullptr, nullptr, &status), &std::free);
  return status == 0 ? name.get() : typeid(error).name();
}

// Answers with what is wrong with models, by name.
void answer_problems(Exchange& exchange, const char* good, const Json& problems) {
  if (problems.empty()) {
    answer(exchange, {{"status", good}});
  } else {
    answer(exchange, {{"status", "not ready"}, {"problems", problems}}, 503);
  }
}

}  // namespace

Guard App::handle(Exchange& exchange) {
  Guard guard;
  try {
    guard = enter(exchange.path());
    if (!is_watched(exchange.path())) check_key(settings_.keys, exchange.header("Authorization"));
    route(exchange);
  } catch (const ApiError& error) {
    answer(exchange, error);
  } catch (const dynexport::Error& error) {
    answer(exchange, of_error(error));
  } catch (const std::exception& error) {
    report_("internal error: " + name_of(error));
    answer(exchange, ApiError(500, "internal error").kind("server_error").code("internal_error"));
  }
  return guard;
}

Guard App::enter(const std::string& path) {
  if (is_watched(path)) return nullptr;
  Guard guard(&requests_, [](void* requests) { --*static_cast<std::atomic<std::size_t>*>(requests); });
  if (++requests_ > settings_.requests) {
    throw unavailable("server: expected at most " + std::to_string(settings_.requests) +
                      " requests at a time, found more; try again later");
  }
  return guard;
}

void App::route(Exchange& exchange) {
  struct Route {
    const char* method;
    void (App::*handler)(Exchange&) const;
  };
  static const std::map<std::string, Route> routes = {
      {kModels, {"GET", &App::models}},
      {"/health", {"GET", &App::health}},
      {"/ready", {"GET", &App::ready}},
      {"/metrics", {"GET", &App::metrics}},
      {"/v1/completions", {"POST", &App::completions}},
      {"/v1/chat/completions", {"POST", &App::chat_completions}},
      {"/tokenize", {"POST", &App::tokenize}},
      {"/detokenize", {"POST", &App::detokenize}},
  };
  const std::string& path = exchange.path();
  const std::string under = std::string(kModels) + "/";
  if (path == "/v1/embeddings") {
    throw ApiError(404, "embeddings: this server has language models only; use /v1/completions").code("not_found");
  }
  const auto found = routes.find(path);
  const bool one_model = path.rfind(under, 0) == 0;
  if (found == routes.end() && !one_model) {
    throw ApiError(404, "path: this server has none of this name; see docs/serving.md").code("not_found");
  }
  const std::string allowed = one_model ? "GET" : found->second.method;
  if (exchange.method() != allowed) throw ApiError(405, "Method Not Allowed").header("Allow", allowed);
  if (one_model) {
    model(exchange, path.substr(under.size()));
  } else {
    (this->*found->second.handler)(exchange);
  }
}

Json App::body(Exchange& exchange) const {
  const std::string text = exchange.body(settings_);
  if (text.empty() || !says_json(exchange.header("Content-Type"))) {
    throw ApiError(400, "body: expected a JSON object, with the header Content-Type: application/json")
        .code("invalid_json");
  }
  return parse_body(text);
}

void App::models(Exchange& exchange) const {
  Json entries = Json::array();
  for (const auto& served : directory_.models()) {
    for (Json& entry : served->described()) entries.push_back(std::move(entry));
  }
  answer(exchange, {{"object", "list"}, {"data", entries}});
}

void App::model(Exchange& exchange, const std::string& name) const {
  const Served* served = directory_.find(name).first;
  const std::vector<Json> entries = served->described();
  for (const Json& entry : entries) {
    if (entry["id"] == name) return answer(exchange, entry);
  }
  answer(exchange, entries.front());  // a depth by another of its names
}

void App::completions(Exchange& exchange) const {
  const CompletionBody asked = completion_body(body(exchange));
  deliver(exchange, Answer(Kind::kCompletion, asked_completion(directory_, asked, settings_.request_seconds)));
}

void App::chat_completions(Exchange& exchange) const {
  const ChatBody asked = chat_body(body(exchange));
  deliver(exchange, Answer(Kind::kChat, asked_chat(directory_, asked, settings_.request_seconds)));
}

void App::tokenize(Exchange& exchange) const {
  const TokenizeBody asked = tokenize_body(body(exchange));
  const Served& served = *directory_.find(asked.model).first;
  if (asked.prompt.has_value() != asked.messages.is_null()) {
    throw wrong_field("prompt", "expected it or messages, found both or none");
  }
  if (served.model().tokenizer() == nullptr) served.model().encode("");  // says that there is none
  const Ids ids = asked.prompt ? served.model().tokenizer()->encode(*asked.prompt, asked.add_special_tokens)
                               : chat_tokens(served, asked.messages);
  answer(exchange, {{"tokens", ids}, {"count", ids.size()}, {"max_model_len", served.tokens()}});
}

void App::detokenize(Exchange& exchange) const {
  const DetokenizeBody asked = detokenize_body(body(exchange));
  const Served& served = *directory_.find(asked.model).first;
  if (served.model().tokenizer() == nullptr) served.model().encode("");  // says that there is none
  answer(exchange, {{"prompt", served.model().tokenizer()->decode(asked.tokens, false)}});
}

void App::health(Exchange& exchange) const {
  Json problems = Json::object();
  for (const auto& served : directory_.models()) {
    if (served->worker().dead()) problems[served->name()] = served->worker().problem();
  }
  answer_problems(exchange, "ok", problems);
}

void App::ready(Exchange& exchange) const {
  Json problems = Json::object();
  for (const auto& served : directory_.models()) {
    const std::string problem = served->worker().problem();
    if (!problem.empty()) problems[served->name()] = problem;
  }
  answer_problems(exchange, "ready", problems);
}

void App::metrics(Exchange& exchange) const {
  exchange.response().status = 200;
  exchange.response().set_content(expose_(), "text/plain; version=0.0.4; charset=utf-8");
}

}  // namespace service
