// Classes of characters, by ICU's tables.
#include "text/characters.hpp"

#include <unicode/uchar.h>

namespace dynexport::text {

bool is_space(char32_t code) {
  return (code >= 0x9 && code <= 0xd) || u_hasBinaryProperty(static_cast<UChar32>(code), UCHAR_WHITE_SPACE);
}

bool is_word(char32_t code) {
  const auto point = static_cast<UChar32>(code);
  const auto kinds = U_GET_GC_MASK(point);
  return (kinds & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0 || u_hasBinaryProperty(point, UCHAR_ALPHABETIC) ||
         u_hasBinaryProperty(point, UCHAR_JOIN_CONTROL);
}

bool is_number(char32_t code) { return (U_GET_GC_MASK(static_cast<UChar32>(code)) & U_GC_N_MASK) != 0; }

bool is_punctuation(char32_t code) {
  if (code < 0x80) return code > 0x20 && code < 0x7f && !u_isalnum(static_cast<UChar32>(code));
  return (U_GET_GC_MASK(static_cast<UChar32>(code)) & U_GC_P_MASK) != 0;
}

}  // namespace dynexport::text
