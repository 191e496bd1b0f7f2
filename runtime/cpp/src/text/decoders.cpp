// Decoders: byte letters, byte tokens, replacements, marks for spaces.
#include "text/decoders.hpp"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "text/byte_alphabet.hpp"
#include "text/fields.hpp"
#include "text/pattern.hpp"
#include "text/sequences.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

std::string joined(const Pieces& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  return text;
}

// The bytes of a token in the byte alphabet; the token itself if it has other characters.
void append_bytes(const std::string& token, std::string& bytes) {
  const std::size_t before = bytes.size();
  for (std::size_t at = 0; at < token.size(); at += length_at(token, at)) {
    const auto byte = byte_of(code_at(token, at));
    if (!byte) {
      bytes.resize(before);
      bytes += token;
      return;
    }
    bytes.push_back(static_cast<char>(*byte));
  }
}

Decoder byte_level(const Fields& part) {
  part.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  return [](const Pieces& pieces) {
    std::string bytes;
    for (const std::string& piece : pieces) append_bytes(piece, bytes);
    return Pieces{repaired(bytes)};
  };
}

int hexadecimal(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

// The byte of a token such as <0x0A>.
std::optional<char> byte_token(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return std::nullopt;
  const int high = token[3] == '+' ? 0 : hexadecimal(token[3]), low = hexadecimal(token[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<char>(high << 4 | low);
}

// Neighbouring byte tokens become text, or a U+FFFD each if together they are not UTF-8.
Decoder byte_fallback(const Fields& part) {
  part.only({"type"});
  return [](const Pieces& pieces) {
    Pieces out;
    std::string bytes;
    const auto flush = [&] {
      if (valid_length(bytes) == bytes.size()) {
        if (!bytes.empty()) out.push_back(bytes);
      } else {
        out.insert(out.end(), bytes.size(), std::string(kReplacement));
      }
      bytes.clear();
    };
    for (const std::string& piece : pieces) {
      if (const auto byte = byte_token(piece)) {
        bytes.push_back(*byte);
        continue;
      }
      flush();
      out.push_back(piece);
    }
    flush();
    return out;
  };
}

// Whether a replacement is one of those that remove spaces before punctuation (Python's CLEAN_UPS).
bool is_clean_up(const Pattern& pattern) {
  const std::string& text = pattern.source();
  return pattern.is_literal() && text.size() > 1 && text.front() == ' ';
}

Decoding replace(const Fields& part) {
  part.only({"type", "pattern", "content"});
  const Pattern pattern = Pattern::of(part);
  const bool cleans_up = is_clean_up(pattern);
  return {[pattern, with = part.text("content")](Pieces pieces) {
            for (std::string& piece : pieces) piece = replaced(pattern, piece, with);
            return pieces;
          },
          cleans_up};
}

// Removes up to ``start`` and ``stop`` characters of one kind from the ends of each piece.
Decoder strip(const Fields& part) {
  part.only({"type", "content", "start", "stop"});
  const std::string& what = part.filled("content");
  if (length_at(what, 0) != what.size()) throw part.expected("content", "one character");
  const std::int64_t start = part.number("start", 1 << 16), stop = part.number("stop", 1 << 16);
  return [what = std::string(what), start, stop](Pieces pieces) {
    for (std::string& piece : pieces) {
      std::size_t begin = 0, end = piece.size();
      for (std::int64_t i = 0; i < start && piece.compare(begin, what.size(), what) == 0; ++i) begin += what.size();
      for (std::int64_t i = 0; i < stop && end >= begin + what.size(); ++i) {
        if (piece.compare(end - what.size(), what.size(), what) != 0) break;
        end -= what.size();
      }
      piece = piece.substr(begin, end - begin);
    }
    return pieces;
  };
}

Decoder metaspace(const Fields& part) {
  part.only({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
  const Pattern mark = Pattern::literal(part.filled("replacement"));
  const bool never = (part.has("prepend_scheme") && part.text("prepend_scheme") == "never") ||
                     (part.has("add_prefix_space") && !part.flag("add_prefix_space"));
  return [mark, never](Pieces pieces) {
    for (std::size_t i = 0; i < pieces.size(); ++i) pieces[i] = replaced(mark, pieces[i], i == 0 && !never ? "" : " ");
    return pieces;
  };
}

Decoder fuse(const Fields& part) {
  part.only({"type"});
  return [](const Pieces& pieces) { return Pieces{joined(pieces)}; };
}

Decoding read(const Fields& part, int depth);

Decoding sequence(const Fields& part, int depth) {
  auto steps = read_steps<Decoding>(part, "decoders", depth, read);
  const bool cleans_up = std::any_of(steps.begin(), steps.end(), [](const auto& step) { return step.cleans_up; });
  return {[steps = std::move(steps)](Pieces pieces) {
            for (const auto& step : steps) pieces = step.decode(std::move(pieces));
            return pieces;
          },
          cleans_up};
}

Pieces joined_by_spaces(const Pieces& pieces) {
  std::string text;
  for (std::size_t i = 0; i < pieces.size(); ++i) text += (i == 0 ? "" : " ") + pieces[i];
  return Pieces{text};
}

Decoding read(const Fields& part, int depth) {
  const std::string& type = part.text("type");
  if (type == "Sequence") return sequence(part, depth);
  if (type == "ByteLevel") return {byte_level(part)};
  if (type == "ByteFallback") return {byte_fallback(part)};
  if (type == "Fuse") return {fuse(part)};
  if (type == "Replace") return replace(part);
  if (type == "Strip") return {strip(part)};
  if (type == "Metaspace") return {metaspace(part)};
  throw part.unknown("the decoder " + shown(type));
}

}  // namespace

Decoding read_decoder(const nlohmann::json& description, const std::string& where) {
  if (description.is_null()) return {joined_by_spaces};
  const Fields part(description, where + ": decoder");
  // The analyzer loses track of functions that a vector owns; LeakSanitizer finds no leak.
  return read(part, 0);  // NOLINT(clang-analyzer-cplusplus.NewDeleteLeaks)
}

}  // namespace dynexport::text
