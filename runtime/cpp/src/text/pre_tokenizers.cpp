// Pre-tokenizers: splits by patterns and classes of characters, byte letters, marks for spaces.
#include "text/pre_tokenizers.hpp"

#include <string_view>
#include <utility>

#include "text/byte_alphabet.hpp"
#include "text/characters.hpp"
#include "text/fields.hpp"
#include "text/pattern.hpp"
#include "text/sequences.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr const char* kGpt2Words = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// What becomes of a match.
enum class Behaviour { kRemoved, kIsolated, kContiguous, kMergedWithPrevious, kMergedWithNext };

Behaviour behaviour_of(const Fields& part) {
  const std::string& name = part.text("behavior");
  if (name == "Removed") return Behaviour::kRemoved;
  if (name == "Isolated") return Behaviour::kIsolated;
  if (name == "Contiguous") return Behaviour::kContiguous;
  if (name == "MergedWithPrevious") return Behaviour::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behaviour::kMergedWithNext;
  throw part.unknown("the behavior " + shown(name));
}

// Whether a word ends after a span, or goes on with the next one.
bool ends_after(const std::vector<Span>& spans, std::size_t i, Behaviour behaviour) {
  if (i + 1 == spans.size()) return true;
  const bool match = spans[i].match, next = spans[i + 1].match;
  switch (behaviour) {
    case Behaviour::kContiguous:
      return match != next;
    case Behaviour::kMergedWithPrevious:
      return match || !next;
    case Behaviour::kMergedWithNext:
      return !match || next;
    default:
      return true;
  }
}

// Cuts words; ``spans_of`` returns the spans of a text.
template <typename SpansOf>
Words cut(const Words& words, Behaviour behaviour, const SpansOf& spans_of) {
  Words out;
  out.reserve(words.size());
  for (const Word& word : words) {
    const std::vector<Span> spans = spans_of(word.text);
    std::size_t begin = 0;
    for (std::size_t i = 0; i < spans.size(); ++i) {
      const bool removed = behaviour == Behaviour::kRemoved && spans[i].match;
      if (!ends_after(spans, i, behaviour)) continue;
      if (!removed && spans[i].end > begin) {
        out.push_back({word.text.substr(begin, spans[i].end - begin), word.first && begin == 0});
      }
      begin = spans[i].end;
    }
  }
  return out;
}

PreTokenizer by_pattern(Pattern pattern, Behaviour behaviour, bool invert = false) {
  return [pattern = std::move(pattern), behaviour, invert](const Words& words) {
    return cut(words, behaviour, [&](std::string_view text) {
      std::vector<Span> spans = pattern.spans(text);
      for (Span& span : spans) span.match = span.match != invert;
      return spans;
    });
  };
}

// Splits at every character of a class.
PreTokenizer by_class(bool (*is_of_class)(char32_t), Behaviour behaviour) {
  return [is_of_class, behaviour](const Words& words) {
    return cut(words, behaviour, [&](std::string_view text) {
      std::vector<Span> spans;
      for (std::size_t at = 0, next; at < text.size(); at = next) {
        next = at + length_at(text, at);
        const bool match = is_of_class(code_at(text, at));
        if (!match && !spans.empty() && !spans.back().match) {
          spans.back().end = next;
        } else {
          spans.push_back({at, next, match});
        }
      }
      return spans;
    });
  };
}

PreTokenizer split(const Fields& part) {
  part.only({"type", "pattern", "behavior", "invert"});
  return by_pattern(Pattern::of(part), behaviour_of(part), part.flag("invert", false));
}

PreTokenizer digits(const Fields& part) {
  part.only({"type", "individual_digits"});
  return by_class(is_number, part.flag("individual_digits", false) ? Behaviour::kIsolated : Behaviour::kContiguous);
}

PreTokenizer byte_level(const Fields& part) {
  part.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  const bool prefix = part.flag("add_prefix_space");
  PreTokenizer words_of;
  if (part.flag("use_regex", true))
    words_of = by_pattern(Pattern::regex(kGpt2Words, part.where()), Behaviour::kIsolated);
  return [prefix, words_of](Words words) {
    for (Word& word : words) {
      if (prefix && !word.text.empty() && word.text.front() != ' ') word.text.insert(0, " ");
    }
    if (words_of) words = words_of(std::move(words));
    for (Word& word : words) word.text = in_byte_alphabet(word.text);
    return words;
  };
}

enum class Prepended { kAlways, kFirst, kNever };

Prepended prepended_of(const Fields& part) {
  const bool never = part.has("add_prefix_space") && !part.flag("add_prefix_space");
  const std::string scheme = part.has("prepend_scheme") ? part.text("prepend_scheme") : never ? "never" : "always";
  if (never && scheme != "never") throw part.expected("prepend_scheme", "never, as add_prefix_space is false");
  if (scheme == "always") return Prepended::kAlways;
  if (scheme == "first") return Prepended::kFirst;
  if (scheme == "never") return Prepended::kNever;
  throw part.unknown("the prepend_scheme " + shown(scheme));
}

PreTokenizer metaspace(const Fields& part) {
  part.only({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
  const std::string& mark = part.filled("replacement");
  if (length_at(mark, 0) != mark.size()) throw part.expected("replacement", "one character");
  const Prepended prepended = prepended_of(part);
  PreTokenizer words_of;
  if (part.flag("split", true)) words_of = by_pattern(Pattern::literal(mark), Behaviour::kMergedWithNext);
  return [mark = std::string(mark), prepended, words_of, space = Pattern::literal(" ")](Words words) {
    for (Word& word : words) {
      word.text = replaced(space, word.text, mark);
      const bool wanted = prepended == Prepended::kAlways || (prepended == Prepended::kFirst && word.first);
      if (wanted && !word.text.empty() && word.text.compare(0, mark.size(), mark) != 0) word.text.insert(0, mark);
    }
    return words_of ? words_of(std::move(words)) : words;
  };
}

PreTokenizer punctuation(const Fields& part) {
  part.only({"type", "behavior"});
  return by_class(is_punctuation, part.has("behavior") ? behaviour_of(part) : Behaviour::kIsolated);
}

PreTokenizer read(const Fields& part, int depth);

PreTokenizer sequence(const Fields& part, int depth) {
  auto steps = read_steps<PreTokenizer>(part, "pretokenizers", depth, read);
  return [steps = std::move(steps)](Words words) {
    for (const auto& step : steps) words = step(std::move(words));
    return words;
  };
}

PreTokenizer read(const Fields& part, int depth) {
  const std::string& type = part.text("type");
  if (type == "Sequence") return sequence(part, depth);
  if (type == "Split") return split(part);
  if (type == "Digits") return digits(part);
  if (type == "ByteLevel") return byte_level(part);
  if (type == "Metaspace") return metaspace(part);
  if (type == "Punctuation") return punctuation(part);
  if (type == "WhitespaceSplit") return by_class(is_space, Behaviour::kRemoved);
  throw part.unknown("the pre-tokenizer " + shown(type));
}

}  // namespace

PreTokenizer read_pre_tokenizer(const nlohmann::json& description, const std::string& where) {
  if (description.is_null()) return [](Words words) { return words; };
  return read(Fields(description, where + ": pre_tokenizer"), 0);
}

}  // namespace dynexport::text
