// Text as Python's str has it.
#include "text/python_text.hpp"

#include <unicode/bytestream.h>
#include <unicode/casemap.h>
#include <unicode/uchar.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "text/characters.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

using ToCase = void (*)(const char*, std::uint32_t, icu::StringPiece, icu::ByteSink&, icu::Edits*, UErrorCode&);

std::string in_case(std::string_view text, ToCase change) {
  std::string out;
  icu::StringByteSink<std::string> sink(&out);
  UErrorCode status = U_ZERO_ERROR;
  change("", 0, {text.data(), static_cast<std::int32_t>(text.size())}, sink, nullptr, status);
  return out;
}

// Python's str.isprintable of a character.
bool is_printable(char32_t code) {
  if (code == U' ') return true;
  return (U_GET_GC_MASK(static_cast<UChar32>(code)) & (U_GC_C_MASK | U_GC_Z_MASK)) == 0;
}

void append_hex(std::string& out, const char* head, char32_t code, int digits) {
  std::array<char, 16> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%s%0*x", head, digits, static_cast<unsigned>(code));
  out += buffer.data();
}

bool ends_line(char32_t code) {
  return (code >= 0xa && code <= 0xd) || (code >= 0x1c && code <= 0x1e) || code == 0x85 || code == 0x2028 ||
         code == 0x2029;
}

std::vector<std::string> split_at_spaces(std::string_view text, std::int64_t most) {
  std::vector<std::string> parts;
  std::string_view rest = text;
  const auto space_at = [&](std::size_t at) { return is_python_space(code_at(rest, at)); };
  for (;;) {
    std::size_t begin = 0;
    while (begin < rest.size() && space_at(begin)) begin += length_at(rest, begin);
    rest.remove_prefix(begin);
    if (rest.empty()) return parts;
    if (most >= 0 && static_cast<std::int64_t>(parts.size()) == most) {
      parts.push_back(stripped(rest, std::nullopt, false, true));
      return parts;
    }
    std::size_t end = 0;
    while (end < rest.size() && !space_at(end)) end += length_at(rest, end);
    parts.emplace_back(rest.substr(0, end));
    rest.remove_prefix(end);
  }
}

}  // namespace

bool is_python_space(char32_t code) { return is_space(code) || (code >= 0x1c && code <= 0x1f); }

std::int64_t character_count(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char byte) { return (static_cast<unsigned char>(byte) & 0xc0U) != 0x80U; });
}

std::string stripped(std::string_view text, const std::optional<std::string>& characters, bool left, bool right) {
  const std::u32string wanted = characters ? code_points(*characters) : std::u32string();
  const auto goes = [&](char32_t code) {
    return characters ? wanted.find(code) != std::u32string::npos : is_python_space(code);
  };
  while (left && !text.empty() && goes(code_at(text, 0))) text.remove_prefix(length_at(text, 0));
  while (right && !text.empty()) {
    const std::size_t last = start_before(text, text.size());
    if (!goes(code_at(text, last))) break;
    text = text.substr(0, last);
  }
  return std::string(text);
}

std::vector<std::string> split(std::string_view text, const std::optional<std::string>& separator, std::int64_t most) {
  if (!separator) return split_at_spaces(text, most);
  std::vector<std::string> parts;
  while (most < 0 || static_cast<std::int64_t>(parts.size()) < most) {
    const std::size_t found = text.find(*separator);
    if (found == std::string_view::npos) break;
    parts.emplace_back(text.substr(0, found));
    text.remove_prefix(found + separator->size());
  }
  parts.emplace_back(text);
  return parts;
}

std::vector<std::string> split_lines(std::string_view text) {
  std::vector<std::string> lines;
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t next = at + length_at(text, at);
    const bool ends = ends_line(code_at(text, at));
    if (ends) {
      lines.emplace_back(text.substr(begin, at - begin));
      begin = next + (text.substr(at, 2) == "\r\n" ? 1 : 0);
    }
    at = ends ? begin : next;
  }
  if (begin < text.size()) lines.emplace_back(text.substr(begin));
  return lines;
}

std::string replaced_text(std::string_view text, std::string_view from, std::string_view to, std::int64_t most) {
  std::string out;
  std::int64_t done = 0;
  std::size_t at = 0;
  while (most < 0 || done < most) {
    // Empty text stands before every character, and at the end.
    const std::size_t found = from.empty() ? at : text.find(from, at);
    if (found == std::string_view::npos || found > text.size()) break;
    out += text.substr(at, found - at);
    out += to;
    at = found + from.size();
    ++done;
    if (!from.empty()) continue;
    if (at == text.size()) return out;
    const std::size_t length = length_at(text, at);
    out += text.substr(at, length);
    at += length;
  }
  out += text.substr(std::min(at, text.size()));
  return out;
}

std::string upper(std::string_view text) { return in_case(text, icu::CaseMap::utf8ToUpper); }

std::string lower(std::string_view text) { return in_case(text, icu::CaseMap::utf8ToLower); }

std::string capitalized(std::string_view text) {
  if (text.empty()) return "";
  std::string out;
  append(out, static_cast<char32_t>(u_totitle(static_cast<UChar32>(code_at(text, 0)))));
  return out + lower(text.substr(length_at(text, 0)));
}

std::string python_repr(std::string_view text) {
  const bool single = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = single ? '"' : '\'';
  std::string out(1, quote);
  for (std::size_t at = 0; at < text.size(); at += length_at(text, at)) {
    const char32_t code = code_at(text, at);
    if (code == static_cast<char32_t>(quote) || code == U'\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == U'\n') {
      out += "\\n";
    } else if (code == U'\r') {
      out += "\\r";
    } else if (code == U'\t') {
      out += "\\t";
    } else if (is_printable(code)) {
      append(out, code);
    } else if (code < 0x100) {
      append_hex(out, "\\x", code, 2);
    } else {
      append_hex(out, code < 0x10000 ? "\\u" : "\\U", code, code < 0x10000 ? 4 : 8);
    }
  }
  return out + quote;
}

std::string json_string(std::string_view text, bool ascii) {
  std::string out = "\"";
  for (std::size_t at = 0; at < text.size(); at += length_at(text, at)) {
    const char32_t code = code_at(text, at);
    constexpr std::string_view kNamed = "\"\\\n\r\t\f\b", kNames = "\"\\nrtfb";
    const std::size_t named = code < 0x80 ? kNamed.find(static_cast<char>(code)) : std::string_view::npos;
    if (named != std::string_view::npos) {
      out += '\\';
      out += kNames[named];
    } else if (code < 0x20 || (ascii && code > 0x7e && code < 0x10000)) {
      append_hex(out, "\\u", code, 4);
    } else if (ascii && code >= 0x10000) {
      append_hex(out, "\\u", 0xd800 + ((code - 0x10000) >> 10), 4);
      append_hex(out, "\\u", 0xdc00 + ((code - 0x10000) & 0x3ff), 4);
    } else {
      append(out, code);
    }
  }
  return out + '"';
}

}  // namespace dynexport::text
