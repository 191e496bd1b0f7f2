// Regular expressions of Oniguruma's dialect, rewritten to what they mean in PCRE2's.
#include <cctype>
#include <cstddef>
#include <optional>

#include "text/characters.hpp"
#include "text/pattern.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr int kDeepest = 32;

// What a set matches: its items if it is plain, else an expression for one character.
struct Set {
  std::string items;
  std::string expression;
  bool plain = false;
};

std::string in_set(std::string_view items, bool negated) {
  return std::string(negated ? "[^" : "[") + std::string(items) + "]";
}

class Translation {
 public:
  Translation(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  std::string run() {
    std::string out;
    if (text_.substr(0, 4) == "(?i)") {
      out = "(?i)";
      at_ = 4;
    }
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\\') {
        out += escape();
      } else if (c == '[') {
        out += set(0).expression;
      } else if (c == '(') {
        out += group();
      } else if (c == '{') {
        out += repetition();
      } else {
        out += c;
        ++at_;
      }
    }
    return out;
  }

 private:
  [[nodiscard]] Error unknown(const std::string& what) const {
    return Error(where_ + ": " + what + " in the regular expression " + shown(text_) + " is not known to this runtime");
  }

  bool next_is(std::string_view what) const { return text_.substr(at_, what.size()) == what; }

  std::string take(std::size_t bytes) {
    std::string taken(text_.substr(at_, bytes));
    at_ += bytes;
    return taken;
  }

  std::string group() {
    if (!next_is("(?")) return take(1);
    for (const std::string_view known : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
      if (next_is(known)) return take(known.size());
    }
    throw unknown("the group " + shown(text_.substr(at_, 4)));
  }

  // {n}, {n,} or {n,m}: other braces, and what may follow these, mean different things.
  std::string repetition() {
    std::size_t end = at_ + 1;
    const auto digits = [&] {
      const std::size_t first = end;
      while (end < text_.size() && std::isdigit(static_cast<unsigned char>(text_[end])) != 0) ++end;
      return end > first;
    };
    bool good = digits();
    if (good && end < text_.size() && text_[end] == ',') {
      ++end;
      digits();
    }
    good = good && end < text_.size() && text_[end] == '}';
    const char after = good && end + 1 < text_.size() ? text_[end + 1] : ' ';
    if (!good || after == '+' || after == '?') throw unknown("a brace");
    return take(end + 1 - at_);
  }

  // An escape outside of a set.
  std::string escape() {
    const char kind = escaped();
    const std::string word = in_set(kWords, false);
    switch (kind) {
      case 's':
      case 'S':
        at_ += 2;
        return in_set(kSpaces, kind == 'S');
      case 'w':
      case 'W':
        at_ += 2;
        return in_set(kWords, kind == 'W');
      case 'b':
        at_ += 2;
        return "(?:(?<=" + word + ")(?!" + word + ")|(?<!" + word + ")(?=" + word + "))";
      case 'A':
      case 'z':
        return take(2);
      default:
        return character();
    }
  }

  char escaped() const {
    if (at_ + 1 >= text_.size()) throw unknown("a backslash at the end");
    return text_[at_ + 1];
  }

  // An escape that means the same in and outside of a set.
  std::string character() {
    const char kind = escaped();
    if (kind == 'd' || kind == 'D' || kind == 'r' || kind == 'n' || kind == 't' || kind == 'f') return take(2);
    if (kind == 'p' || kind == 'P') return property();
    if (kind == 'x' || kind == 'u') return number(kind);
    if (std::isalnum(static_cast<unsigned char>(kind)) != 0) throw unknown("the escape " + shown(text_.substr(at_, 2)));
    return take(1 + length_at(text_, at_ + 1));
  }

  // \p{..}: a general category, or a script, which PCRE2 would take for a script and its extensions.
  std::string property() {
    const std::string head = take(2);
    const std::size_t end = text_.find('}', at_);
    if (!next_is("{") || end == std::string_view::npos || end - at_ > 40) throw unknown("a property");
    std::string name = take(end + 1 - at_).substr(1);
    name.pop_back();
    const bool inverse = !name.empty() && name.front() == '^';
    if (inverse) name.erase(0, 1);
    return head + (inverse ? "{^" : "{") + (name.size() > 2 ? "sc:" : "") + name + "}";
  }

  std::string number(char kind) {
    const bool braces = kind == 'x' && text_.substr(at_ + 2, 1) == "{";
    const std::size_t first = at_ + (braces ? 3 : 2);
    const std::size_t most = braces ? 6 : kind == 'x' ? 2 : 4;
    std::size_t end = first;
    while (end < text_.size() && end - first < most && std::isxdigit(static_cast<unsigned char>(text_[end])) != 0)
      ++end;
    const std::string digits(text_.substr(first, end - first));
    const bool good = braces ? !digits.empty() && text_.substr(end, 1) == "}" : digits.size() == most;
    if (!good) throw unknown("the escape " + shown(text_.substr(at_, 4)));
    at_ = end + (braces ? 1 : 0);
    return "\\x{" + digits + "}";
  }

  // A set; sets in it, and intersections, become expressions for one character.
  Set set(int depth) {
    if (depth > kDeepest) throw unknown("so deep a set");
    ++at_;
    const bool negated = next_is("^");
    if (negated) ++at_;
    if (next_is("]")) throw unknown("a set that begins with ]");
    std::string before;  // the parts of an intersection but the last, as look-aheads
    for (;;) {
      Set part = united(depth);
      if (next_is("&&")) {
        at_ += 2;
        before += "(?=" + part.expression + ")";
        continue;
      }
      if (!next_is("]")) throw unknown("a set without an end");
      ++at_;
      if (before.empty() && part.plain) return {part.items, in_set(part.items, negated), !negated};
      const std::string one = before + part.expression;
      return {"", negated ? "(?:(?!" + one + ")(?s:.))" : "(?:" + one + ")", false};
    }
  }

  // The items up to the end of a set, or to &&.
  Set united(int depth) {
    std::string items, others;
    const auto or_else = [&](const std::string& expression) { others += (others.empty() ? "" : "|") + expression; };
    while (at_ < text_.size() && text_[at_] != ']' && !next_is("&&")) {
      const char c = text_[at_];
      if (c == '[') {
        if (next_is("[:")) throw unknown("a named set");
        const Set inner = set(depth + 1);
        if (inner.plain) {
          items += inner.items;
        } else {
          or_else(inner.expression);
        }
      } else if (c == '\\') {
        const char kind = escaped();
        const std::string_view named = kind == 's' || kind == 'S' ? kSpaces : kWords;
        if (kind == 's' || kind == 'w') {
          items += named;
        } else if (kind == 'S' || kind == 'W') {
          or_else(in_set(named, true));
        } else {
          items += character();
          continue;
        }
        at_ += 2;
      } else {
        items += take(length_at(text_, at_));
      }
    }
    if (others.empty() && items.empty()) throw unknown("an empty set");
    if (others.empty()) return {items, in_set(items, false), true};
    if (!items.empty()) or_else(in_set(items, false));
    return {"", "(?:" + others + ")", false};
  }

  std::string_view text_;
  const std::string& where_;
  std::size_t at_ = 0;
};

}  // namespace

std::string translated(std::string_view expression, const std::string& where) {
  return Translation(expression, where).run();
}

}  // namespace dynexport::text
