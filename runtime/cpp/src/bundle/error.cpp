// Errors in one line: what they quote is escaped, and bounded.
#include "dynexport/error.hpp"

#include <unicode/uchar.h>
#include <unicode/utf8.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "bundle/text.hpp"

namespace dynexport {
namespace {

// Most characters of an error. A longer one loses its middle: it starts with the place and ends with the advice.
constexpr std::size_t kLongest = 900, kEnd = 300;
// The most characters of a value that an error shows.
constexpr std::size_t kShown = 80;

bool is_printable(std::int32_t c) {
  return c == ' ' || (c >= 0 && (U_GET_GC_MASK(c) & (U_GC_C_MASK | U_GC_Z_MASK)) == 0);
}

std::string escape(std::int32_t c) {
  switch (c) {
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    default:
      break;
  }
  char text[16];
  const char* format = c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x";
  std::snprintf(text, sizeof text, format, static_cast<unsigned>(c));
  return text;
}

// Takes the next character from ``text``. A byte that is not UTF-8 becomes half of a surrogate pair, as in Python.
std::int32_t next(std::string_view& text) {
  // A character has at most four bytes; ICU counts with 32 bits.
  const auto most = static_cast<std::int32_t>(std::min<std::size_t>(text.size(), 4));
  std::int32_t place = 0, found = 0;
  U8_NEXT(text.data(), place, most, found);
  if (found < 0) {
    found = 0xdc00 + static_cast<unsigned char>(text.front());
    place = 1;
  }
  text.remove_prefix(static_cast<std::size_t>(place));
  return found;
}

// Returns the place in ``text`` after its first ``count`` characters.
std::size_t after(std::string_view text, std::size_t count) {
  std::string_view rest = text;
  for (; count > 0 && !rest.empty(); --count) next(rest);
  return text.size() - rest.size();
}

std::size_t characters(std::string_view text) {
  std::size_t count = 0;
  for (; !text.empty(); ++count) next(text);
  return count;
}

std::string shortened(std::string_view text) {
  const std::size_t count = characters(text);
  if (count <= kLongest) return std::string(text);
  return std::string(cut(text, kLongest - kEnd - 4)) + " .. " + std::string(text.substr(after(text, count - kEnd)));
}

// Returns a text with the characters escaped that ``quote`` and Python require; no quote is 0.
std::string escaped(std::string_view text, std::int32_t quote) {
  std::string result;
  while (!text.empty()) {
    const std::string_view before = text;
    const std::int32_t c = next(text);
    if (quote != 0 && (c == quote || c == '\\')) result += '\\';
    if (is_printable(c)) {
      result += before.substr(0, before.size() - text.size());
    } else {
      result += escape(c);
    }
  }
  return result;
}

}  // namespace

Error::Error(std::string_view message) : std::runtime_error(one_line(message)) {}

std::string printable(std::string_view text) { return escaped(text, 0); }

std::string in_quotes(std::string_view text) {
  constexpr auto npos = std::string_view::npos;
  const char quote = text.find('\'') != npos && text.find('"') == npos ? '"' : '\'';
  return quote + escaped(text, quote) + quote;
}

std::string_view cut(std::string_view text, std::size_t most) { return text.substr(0, after(text, most)); }

std::string without_breaks(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

std::string one_line(std::string_view text) { return shortened(printable(shortened(text))); }

std::string shown(std::string_view text) {
  // Only as much is escaped as can be shown; the choice of quotes needs the whole text.
  const std::string all = in_quotes(text);
  const std::string_view start = cut(all, kShown);
  return start.size() == all.size() ? all : std::string(start) + "..";
}

}  // namespace dynexport
