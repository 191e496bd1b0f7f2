// Text as Python's str has it: what chat templates do with strings. All texts are UTF-8; places count characters.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dynexport::text {

// Python's str.isspace of a character.
bool is_python_space(char32_t code);

std::int64_t character_count(std::string_view text);

// Without the characters of ``characters`` (none: spaces) at the ends.
std::string stripped(std::string_view text, const std::optional<std::string>& characters, bool left, bool right);

// str.split, with a separator, or none for runs of spaces; at most ``most`` cuts, any number if negative.
std::vector<std::string> split(std::string_view text, const std::optional<std::string>& separator, std::int64_t most);
std::vector<std::string> split_lines(std::string_view text);

std::string replaced_text(std::string_view text, std::string_view from, std::string_view to, std::int64_t most);
std::string upper(std::string_view text);
std::string lower(std::string_view text);
std::string capitalized(std::string_view text);

// repr(text).
std::string python_repr(std::string_view text);

// As json.dumps(text, ensure_ascii=..).
std::string json_string(std::string_view text, bool ascii);

}  // namespace dynexport::text
