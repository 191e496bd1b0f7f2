// JSON of requests and answers; names keep their order, as chat templates show them.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace service {

using Json = nlohmann::ordered_json;

// Parses a request's body. Throws ApiError for a text that is no JSON, that has half of a surrogate pair, or more
// levels or names than any request needs.
Json parse_body(std::string_view text);

// Returns JSON text. Bytes that are not UTF-8 become U+FFFD.
std::string written(const Json& value);

// Returns the first characters of a UTF-8 text.
std::string beginning(const std::string& text, std::size_t characters);

}  // namespace service
