// Classes of characters, as the tokenizers library and regular expressions define them.
#pragma once

#include <string_view>

namespace dynexport::text {

// Unicode's White_Space.
bool is_space(char32_t code);
// Letters, marks, decimal digits, connectors and joiners: \w of Unicode's regular expressions.
bool is_word(char32_t code);
// Numbers of every kind: Nd, Nl and No.
bool is_number(char32_t code);
// ASCII's punctuation, and Unicode's.
bool is_punctuation(char32_t code);

// The same classes inside a set of a regular expression. A word here is Oniguruma's, which has some numbers more.
constexpr std::string_view kSpaces =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kWords =
    R"(\p{L}\p{Nl}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149})"
    R"(\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";

}  // namespace dynexport::text
