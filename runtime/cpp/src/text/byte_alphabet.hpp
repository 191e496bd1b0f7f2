// GPT-2's alphabet: a printable character for each byte.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace dynexport::text {

// Returns the character of every byte of a text.
std::string in_byte_alphabet(std::string_view bytes);

// Returns the byte of a character, or none if it is not of the alphabet.
std::optional<unsigned char> byte_of(char32_t letter);

}  // namespace dynexport::text
