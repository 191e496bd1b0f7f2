// Errors in OpenAI's form.
#pragma once

#include <exception>
#include <map>
#include <optional>
#include <string>

#include "dynexport/error.hpp"
#include "dynexport/work.hpp"
#include "json.hpp"

namespace service {

// An answer with an error: a status, and a body that says in one line what was expected and what was found.
class ApiError : public std::exception {
 public:
  ApiError(int status, const std::string& message);

  // Set OpenAI's ``type``, the field that is wrong, OpenAI's ``code``, and a header.
  ApiError& kind(const std::string& value);
  ApiError& param(const std::optional<std::string>& field);
  ApiError& code(const std::string& value);
  ApiError& header(const std::string& name, const std::string& value);

  int status() const { return status_; }
  const Json& body() const { return body_; }
  const std::map<std::string, std::string>& headers() const { return headers_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  int status_;
  std::string message_;
  Json body_;
  std::map<std::string, std::string> headers_;
};

// Returns the answer to a request that has a wrong field.
ApiError wrong_field(const std::string& field, const std::string& message);

// Returns the answer to a request that the library refuses.
ApiError of_error(const dynexport::Error& error);

// Returns the answer to a request that ended without all of its answers.
ApiError of_failure(const dynexport::Failure& failure);

// Returns the answer to a request that another server, or this one later, can answer.
ApiError unavailable(const std::string& message);

}  // namespace service
