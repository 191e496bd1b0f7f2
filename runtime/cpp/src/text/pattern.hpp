// Patterns that split or replace text: literal text, or a regular expression.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/fields.hpp"

namespace dynexport::text {

// A part of a text: a match of a pattern, or what lies between matches.
struct Span {
  std::size_t begin = 0, end = 0;
  bool match = false;
};

// A pattern of the tokenizers library. Immutable; threads may share it.
class Pattern {
 public:
  static Pattern literal(std::string text);
  // A regular expression in Oniguruma's dialect; throws Error for syntax that is not known.
  static Pattern regex(const std::string& expression, const std::string& where);
  // The field ``pattern`` of a part: {"String": ..} or {"Regex": ..}.
  static Pattern of(const Fields& part);

  // Returns the matches and what lies between them, in order. Throws Error where matching takes too many steps.
  std::vector<Span> spans(std::string_view text) const;

  bool is_literal() const { return code_ == nullptr; }
  const std::string& source() const { return source_; }

 private:
  struct Code;
  std::string source_;
  std::shared_ptr<const Code> code_;  // none for literal text
};

// Returns a text with every match replaced.
std::string replaced(const Pattern& pattern, std::string_view text, std::string_view with);

// Returns a regular expression in PCRE2's dialect that means what it means in Oniguruma's; throws Error for syntax
// that is not known.
std::string translated(std::string_view expression, const std::string& where);

}  // namespace dynexport::text
