#include "api_error.hpp"

#include <cctype>

#include "dynexport/worker.hpp"

namespace service {
namespace {

constexpr std::size_t kLongestName = 100;

std::size_t skip_name(const std::string& text, std::size_t at) {
  while (at < text.size() && (std::islower(static_cast<unsigned char>(text[at])) != 0 || text[at] == '_')) ++at;
  return at;
}

// Returns the field that a message begins with, such as "messages[0].content: ..", and the field's first name.
std::optional<std::pair<std::string, std::string>> named_field(const std::string& message) {
  const std::size_t first = skip_name(message, 0);
  std::size_t at = first;
  while (at < message.size() && message[at] == '[') {
    std::size_t end = at + 1;
    while (end < message.size() && std::isdigit(static_cast<unsigned char>(message[end])) != 0) ++end;
    if (end == at + 1 || end >= message.size() || message[end] != ']') return std::nullopt;
    at = end + 1;
  }
  while (at < message.size() && message[at] == '.') {
    const std::size_t end = skip_name(message, at + 1);
    if (end == at + 1) return std::nullopt;
    at = end;
  }
  if (first == 0 || at >= message.size() || message[at] != ':') return std::nullopt;
  return std::pair(message.substr(0, at), message.substr(0, first));
}

// Returns the field of a request by the name that the library's errors begin with.
std::optional<std::string> param_of(const std::string& message) {
  const auto found = named_field(message);
  if (!found) return std::nullopt;
  if (found->second == "min_new_tokens") return "min_tokens";
  if (found->second == "max_new_tokens") return "max_tokens";
  return found->first;
}

}  // namespace

ApiError::ApiError(int status, const std::string& message)
    : status_(status),
      message_(dynexport::one_line(message)),
      body_({{"error",
              {{"message", message_}, {"type", "invalid_request_error"}, {"param", nullptr}, {"code", nullptr}}}}) {}

ApiError& ApiError::kind(const std::string& value) {
  body_["error"]["type"] = value;
  return *this;
}

ApiError& ApiError::param(const std::optional<std::string>& field) {
  if (field) body_["error"]["param"] = beginning(dynexport::one_line(*field), kLongestName);
  return *this;
}

ApiError& ApiError::code(const std::string& value) {
  body_["error"]["code"] = value;
  return *this;
}

ApiError& ApiError::header(const std::string& name, const std::string& value) {
  headers_[name] = value;
  return *this;
}

ApiError wrong_field(const std::string& field, const std::string& message) {
  return ApiError(400, field + ": " + message).param(field);
}

ApiError of_error(const dynexport::Error& error) {
  const std::string message = error.what();
  if (dynamic_cast<const dynexport::QueueFull*>(&error) != nullptr) {
    return ApiError(429, message).kind("rate_limit_error").code("rate_limit_exceeded").header("Retry-After", "1");
  }
  if (dynamic_cast<const dynexport::Closed*>(&error) != nullptr) return unavailable(message);
  return ApiError(400, message).param(param_of(message));
}

ApiError of_failure(const dynexport::Failure& failure) {
  switch (failure.reason) {
    case dynexport::Reason::kTimeout:
      return ApiError(408, failure.message).kind("timeout_error").code("request_timeout");
    case dynexport::Reason::kClosed:
      return unavailable(failure.message);
    default:
      return ApiError(500, failure.message).kind("server_error").code(std::string(dynexport::name_of(failure.reason)));
  }
}

ApiError unavailable(const std::string& message) {
  return ApiError(503, message).kind("server_error").code("server_unavailable").header("Retry-After", "1");
}

}  // namespace service
