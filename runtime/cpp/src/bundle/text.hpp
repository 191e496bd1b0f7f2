// Small functions on text that errors quote.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace dynexport {

// Returns a text with line breaks and control characters escaped as in Python, such as \x1b and \u202e.
std::string printable(std::string_view text);

// Returns a text as Python's repr does: in quotes, with escapes.
std::string in_quotes(std::string_view text);

// Returns at most the first ``most`` characters of a UTF-8 text.
std::string_view cut(std::string_view text, std::size_t most);

// Returns a text with a space for every line break.
std::string without_breaks(std::string text);

}  // namespace dynexport
