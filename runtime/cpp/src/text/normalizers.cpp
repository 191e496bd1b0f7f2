// Normalizers: replacements, Unicode forms, lower case.
#include "text/normalizers.hpp"

#include <unicode/bytestream.h>
#include <unicode/casemap.h>
#include <unicode/normalizer2.h>
#include <unicode/stringpiece.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "text/byte_alphabet.hpp"
#include "text/characters.hpp"
#include "text/fields.hpp"
#include "text/pattern.hpp"
#include "text/sequences.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

icu::StringPiece piece(const std::string& text) { return {text.data(), static_cast<std::int32_t>(text.size())}; }

Normalizer unicode_form(const Fields& part, const std::string& form) {
  part.only({"type"});
  UErrorCode status = U_ZERO_ERROR;
  const char* tables = form.size() == 4 ? "nfkc" : "nfc";
  const UNormalization2Mode mode = form.back() == 'D' ? UNORM2_DECOMPOSE : UNORM2_COMPOSE;
  const icu::Normalizer2* unit = icu::Normalizer2::getInstance(nullptr, tables, mode, status);
  if (U_FAILURE(status)) throw Error(part.where() + ": ICU has no tables for " + form);
  return [unit](std::string text) {
    UErrorCode found = U_ZERO_ERROR;
    if (unit->isNormalizedUTF8(piece(text), found) != 0) return text;
    std::string out;
    icu::StringByteSink<std::string> sink(&out);
    unit->normalizeUTF8(0, piece(text), sink, nullptr, found);
    if (U_FAILURE(found))
      throw Error(std::string("tokenizer.json: ICU cannot normalize the text: ") + u_errorName(found));
    return out;
  };
}

// Lower case of each character for itself, whatever its neighbours are.
Normalizer lower_case(const Fields& part) {
  part.only({"type"});
  return [](const std::string& text) {
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t length = length_at(text, at);
      UErrorCode status = U_ZERO_ERROR;
      icu::StringByteSink<std::string> sink(&out);
      icu::CaseMap::utf8ToLower("", 0, {text.data() + at, static_cast<std::int32_t>(length)}, sink, nullptr, status);
      at += length;
    }
    return out;
  };
}

Normalizer strip(const Fields& part) {
  part.only({"type", "strip_left", "strip_right"});
  const bool left = part.flag("strip_left"), right = part.flag("strip_right");
  return [left, right](const std::string& text) {
    std::size_t begin = 0, end = text.size();
    while (left && begin < end && is_space(code_at(text, begin))) begin += length_at(text, begin);
    while (right && end > begin && is_space(code_at(text, start_before(text, end)))) end = start_before(text, end);
    return text.substr(begin, end - begin);
  };
}

Normalizer prepend(const Fields& part) {
  part.only({"type", "prepend"});
  return [front = part.text("prepend")](const std::string& text) { return text.empty() ? text : front + text; };
}

Normalizer replace(const Fields& part) {
  part.only({"type", "pattern", "content"});
  return [pattern = Pattern::of(part), with = part.text("content")](const std::string& text) {
    return replaced(pattern, text, with);
  };
}

Normalizer byte_letters(const Fields& part) {
  part.only({"type"});
  return [](const std::string& text) { return in_byte_alphabet(text); };
}

Normalizer read(const Fields& part, int depth);

Normalizer sequence(const Fields& part, int depth) {
  auto steps = read_steps<Normalizer>(part, "normalizers", depth, read);
  return [steps = std::move(steps)](std::string text) {
    for (const auto& step : steps) text = step(std::move(text));
    return text;
  };
}

Normalizer read(const Fields& part, int depth) {
  const std::string& type = part.text("type");
  if (type == "Sequence") return sequence(part, depth);
  if (type == "Prepend") return prepend(part);
  if (type == "Replace") return replace(part);
  if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") return unicode_form(part, type);
  if (type == "Lowercase") return lower_case(part);
  if (type == "Strip") return strip(part);
  if (type == "ByteLevel") return byte_letters(part);
  throw part.unknown("the normalizer " + shown(type));
}

}  // namespace

Normalizer read_normalizer(const nlohmann::json& description, const std::string& where) {
  if (description.is_null()) return [](std::string text) { return text; };
  return read(Fields(description, where + ": normalizer"), 0);
}

}  // namespace dynexport::text
