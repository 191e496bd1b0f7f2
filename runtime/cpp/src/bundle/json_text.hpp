// Untrusted JSON, parsed strictly, with bounded depth and bounded numbers.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dynexport {

// JSON whose objects keep the order of their fields. A look-up in an object takes time in proportion to its size.
using Json = nlohmann::ordered_json;

// Returns the value of a JSON text (RFC 8259) in UTF-8. Throws Error, which names ``where`` and ends with ``advice``,
// when it is not JSON, has a key twice, a number out of range, or more than 64 levels. Whole numbers beyond 64 bits
// become floating point.
Json parse_json(std::string_view text, const std::string& where, const std::string& advice = {});

// The same for a text that must be an object.
Json parse_json_object(std::string_view text, const std::string& where, const std::string& advice = {});

// Returns a value as Python's repr writes what its json reads, for errors.
std::string quoted_value(const Json& value);

}  // namespace dynexport
