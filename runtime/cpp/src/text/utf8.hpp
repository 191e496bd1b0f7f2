// UTF-8: characters, checks, repair.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace dynexport::text {

// The bytes of the character that begins at ``at`` of valid UTF-8.
std::size_t length_at(std::string_view text, std::size_t at);

// The code point that begins at ``at`` of valid UTF-8.
char32_t code_at(std::string_view text, std::size_t at);

// The place where the character before ``end`` begins, in valid UTF-8; ``end`` is at least 1.
std::size_t start_before(std::string_view text, std::size_t end);

void append(std::string& text, char32_t code);
std::u32string code_points(std::string_view text);
std::string utf8(std::u32string_view codes);

// The number of bytes before the first one that is not UTF-8; the length of the text if it is valid.
std::size_t valid_length(std::string_view text);

// Each broken sequence becomes one U+FFFD, as Unicode recommends ("maximal subparts").
std::string repaired(std::string_view text);

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

}  // namespace dynexport::text
