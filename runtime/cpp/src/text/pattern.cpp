// Patterns by PCRE2, with limited steps and memory.
#include "text/pattern.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <chrono>
#include <utility>

#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr std::size_t kLongestExpression = 1 << 16;
// Steps of one match: for ordinary expressions a few per character. Hostile ones end here.
constexpr std::uint32_t kSteps = 1'000'000, kStepsPerByte = 16;
constexpr std::uint32_t kHeap = 256 << 10;    // KiB
constexpr std::chrono::seconds kLongest{10};  // for one text
constexpr std::size_t kLookAtClock = 64;      // matches

struct Free {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

// What a thread needs to match; it serves every pattern.
struct Scratch {
  std::unique_ptr<pcre2_match_data, Free> data{pcre2_match_data_create(1, nullptr)};
  std::unique_ptr<pcre2_match_context, Free> context{pcre2_match_context_create(nullptr)};
};

Error too_much() {
  return Error("tokenizer.json: a regular expression takes too many steps or too much memory; shorten the text");
}

PCRE2_SPTR units(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

}  // namespace

struct Pattern::Code {
  std::unique_ptr<pcre2_code, Free> compiled;

  // Finds the first match at or after ``at``; returns false if there is none.
  bool find(std::string_view text, std::size_t at, Scratch& scratch, Span& found) const {
    const auto match = [&](std::uint32_t options) {
      return pcre2_match(compiled.get(), units(text), text.size(), at, options | PCRE2_NO_UTF_CHECK, scratch.data.get(),
                         scratch.context.get());
    };
    int result = match(0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) return false;
    if (result < 0) throw too_much();
    const std::size_t* ends = pcre2_get_ovector_pointer(scratch.data.get());
    found = {ends[0], ends[1], true};
    return true;
  }

  void find_all(std::string_view text, std::vector<Span>& matches) const;
};

Pattern Pattern::literal(std::string text) {
  Pattern pattern;
  pattern.source_ = std::move(text);
  return pattern;
}

Pattern Pattern::regex(const std::string& expression, const std::string& where) {
  if (expression.size() > kLongestExpression) {
    throw Error(where + ": expected a regular expression of at most " + std::to_string(kLongestExpression) + " bytes");
  }
  const std::string text = translated(expression, where);
  int error = 0;
  std::size_t place = 0;
  auto code = std::make_shared<Code>();
  code->compiled.reset(pcre2_compile(
      units(text), text.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error, &place, nullptr));
  if (!code->compiled) {
    throw Error(where + ": the regular expression " + shown(expression) + " is not known to this runtime");
  }
  pcre2_jit_compile(code->compiled.get(), PCRE2_JIT_COMPLETE);  // without a JIT compiler it is interpreted
  Pattern pattern;
  pattern.source_ = expression;
  pattern.code_ = std::move(code);
  return pattern;
}

Pattern Pattern::of(const Fields& part) {
  const Fields pattern = part.part("pattern");
  pattern.only({"String", "Regex"});
  return pattern.has("String") ? literal(pattern.filled("String")) : regex(pattern.filled("Regex"), pattern.where());
}

void Pattern::Code::find_all(std::string_view text, std::vector<Span>& matches) const {
  thread_local Scratch scratch;
  pcre2_set_match_limit(scratch.context.get(), kSteps + kStepsPerByte * static_cast<std::uint32_t>(text.size()));
  pcre2_set_heap_limit(scratch.context.get(), kHeap);
  const auto start = std::chrono::steady_clock::now();
  Span match;
  std::size_t searches = 0;
  for (std::size_t at = 0; at <= text.size() && find(text, at, scratch, match);) {
    if (++searches % kLookAtClock == 0 && std::chrono::steady_clock::now() - start > kLongest) throw too_much();
    // An empty match right after a match is passed over, so that the search goes on.
    if (match.begin == match.end && !matches.empty() && match.end == matches.back().end) {
      if (match.end == text.size()) break;
      at = match.end + length_at(text, match.end);
      continue;
    }
    matches.push_back(match);
    at = match.end;
  }
}

std::vector<Span> Pattern::spans(std::string_view text) const {
  std::vector<Span> matches, spans;
  if (is_literal()) {
    for (std::size_t at = 0; (at = text.find(source_, at)) != std::string_view::npos; at += source_.size()) {
      matches.push_back({at, at + source_.size(), true});
    }
  } else {
    code_->find_all(text, matches);
  }
  std::size_t done = 0;
  spans.reserve(2 * matches.size() + 1);
  for (const Span& match : matches) {
    if (match.begin > done) spans.push_back({done, match.begin, false});
    spans.push_back(match);
    done = match.end;
  }
  if (done < text.size()) spans.push_back({done, text.size(), false});
  return spans;
}

std::string replaced(const Pattern& pattern, std::string_view text, std::string_view with) {
  std::string out;
  out.reserve(text.size());
  for (const Span& span : pattern.spans(text)) {
    out += span.match ? with : text.substr(span.begin, span.end - span.begin);
  }
  return out;
}

}  // namespace dynexport::text
