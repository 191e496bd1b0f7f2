// UTF-8: characters, checks, repair.
#include "text/utf8.hpp"

#include <algorithm>

namespace dynexport::text {

namespace {

unsigned byte_at(std::string_view text, std::size_t at) {
  return at < text.size() ? static_cast<unsigned char>(text[at]) : 0U;
}

// A sequence that may be broken: how many bytes it has, and whether it is a character.
struct Sequence {
  std::size_t bytes = 1;
  bool whole = false;
};

Sequence sequence_at(std::string_view text, std::size_t at) {
  const unsigned first = byte_at(text, at);
  if (first < 0x80) return {1, true};
  if (first < 0xc2 || first > 0xf4) return {1, false};
  const std::size_t wanted = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  for (std::size_t i = 1; i < wanted; ++i) {
    const unsigned low = i == 1 && first == 0xe0 ? 0xa0 : i == 1 && first == 0xf0 ? 0x90 : 0x80;
    const unsigned high = i == 1 && first == 0xed ? 0x9f : i == 1 && first == 0xf4 ? 0x8f : 0xbf;
    const unsigned next = byte_at(text, at + i);
    if (next < low || next > high) return {i, false};
  }
  return {wanted, true};
}

}  // namespace

std::size_t length_at(std::string_view text, std::size_t at) {
  const unsigned first = byte_at(text, at);
  const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  return std::min(length, text.size() - std::min(at, text.size()));
}

char32_t code_at(std::string_view text, std::size_t at) {
  const auto low = [&](std::size_t i) { return byte_at(text, at + i) & 0x3fU; };
  const unsigned first = byte_at(text, at);
  if (first < 0x80) return first;
  if (first < 0xe0) return (first & 0x1fU) << 6 | low(1);
  if (first < 0xf0) return (first & 0x0fU) << 12 | low(1) << 6 | low(2);
  return (first & 7U) << 18 | low(1) << 12 | low(2) << 6 | low(3);
}

std::size_t start_before(std::string_view text, std::size_t end) {
  std::size_t at = end - 1;
  while (at > 0 && (byte_at(text, at) & 0xc0U) == 0x80U) --at;
  return at;
}

void append(std::string& text, char32_t code) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xc0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3f));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f));
  }
  put(0x80 | (code & 0x3f));
}

std::u32string code_points(std::string_view text) {
  std::u32string codes;
  codes.reserve(text.size());
  for (std::size_t at = 0; at < text.size(); at += length_at(text, at)) codes.push_back(code_at(text, at));
  return codes;
}

std::string utf8(std::u32string_view codes) {
  std::string text;
  text.reserve(codes.size());
  for (const char32_t code : codes) append(text, code);
  return text;
}

std::size_t valid_length(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Sequence found = sequence_at(text, at);
    if (!found.whole) return at;
    at += found.bytes;
  }
  return at;
}

std::string repaired(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Sequence found = sequence_at(text, at);
    out += found.whole ? text.substr(at, found.bytes) : kReplacement;
    at += found.bytes;
  }
  return out;
}

}  // namespace dynexport::text
