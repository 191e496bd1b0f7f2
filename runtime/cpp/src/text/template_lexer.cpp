// The tokens of a chat template.
#include "text/template_lexer.hpp"

#include <array>
#include <cctype>
#include <utility>

#include "text/python_text.hpp"
#include "text/template_value.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }
bool begins_name(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_'; }
bool in_name(char c) { return begins_name(c) || is_digit(c); }

// Every kind of line end becomes \n; one at the end goes.
std::string with_plain_lines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    const bool pair = source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n';
    if (!pair) out += source[i] == '\r' ? '\n' : source[i];
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

int hex_value(char c) {
  const int lower = std::tolower(static_cast<unsigned char>(c));
  return is_digit(c) ? c - '0' : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : text_(std::move(source)) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      const std::size_t open = next_tag();
      const std::string kind = text_.substr(open, 2);
      const char sign = open + 2 < text_.size() ? text_[open + 2] : ' ';
      add_text(open, kind, sign);
      if (kind.empty()) break;
      at_ = open + (sign == '-' || sign == '+' ? 3 : 2);
      if (kind == "{#") {
        comment();
      } else {
        if (kind == "{%") refuse_raw();
        tokens_.push_back({Token::Kind::kOpen, kind});
        code(kind == "{{" ? "}}" : "%}");
      }
    }
    tokens_.emplace_back();
    return std::move(tokens_);
  }

 private:
  static Error wrong(const std::string& what) {
    return Error("chat_template.jinja: expected a Jinja template, found " + what);
  }

  bool has(std::size_t at, std::string_view what) const {
    return at < text_.size() && std::string_view(text_).substr(at, what.size()) == what;
  }

  std::size_t next_tag() const {
    for (std::size_t at = at_; (at = text_.find('{', at)) != std::string::npos; ++at) {
      const char next = at + 1 < text_.size() ? text_[at + 1] : ' ';
      if (next == '{' || next == '%' || next == '#') return at;
    }
    return text_.size();
  }

  // Adds the text before a tag, without the spaces that the tag takes.
  void add_text(std::size_t end, const std::string& kind, char sign) {
    std::string text = text_.substr(at_, end - at_);
    if (sign == '-' && !kind.empty()) {
      text = stripped(text, std::nullopt, false, true);
    } else if (sign != '+' && !kind.empty() && kind != "{{") {
      const std::size_t line = text.rfind('\n') + 1;  // 0 without a line end
      const bool starts = line > 0 || line_starting_;
      if (starts && stripped(text.substr(line), std::nullopt, true, false).empty()) text.resize(line);
    }
    if (!text.empty()) tokens_.push_back({Token::Kind::kText, std::move(text)});
    line_starting_ = false;
  }

  void skip_spaces() {
    while (at_ < text_.size() && is_python_space(code_at(text_, at_))) at_ += length_at(text_, at_);
  }

  // Goes past the end of a block or comment at ``end``, and the spaces that it takes.
  void close(std::size_t end, char sign) {
    at_ = end + 2;
    if (sign == '-') skip_spaces();
    if (sign == ' ' && at_ < text_.size() && text_[at_] == '\n') ++at_;
    line_starting_ = text_[at_ - 1] == '\n';
  }

  static char sign_before(const std::string& text, std::size_t begin, std::size_t end) {
    const char last = end > begin ? text[end - 1] : ' ';
    return last == '-' || last == '+' ? last : ' ';
  }

  void comment() {
    const std::size_t end = text_.find("#}", at_);
    if (end == std::string::npos) throw wrong("a comment without an end");
    close(end, sign_before(text_, at_, end));
  }

  // {% raw %} would make text of what is in it.
  void refuse_raw() const {
    std::size_t at = at_;
    while (at < text_.size() && is_python_space(code_at(text_, at))) at += length_at(text_, at);
    if (has(at, "raw") && (at + 3 >= text_.size() || !in_name(text_[at + 3]))) throw not_known("raw");
  }

  void code(const std::string& end) {
    std::vector<char> open;  // brackets
    for (;;) {
      skip_spaces();
      if (at_ >= text_.size()) throw wrong("a tag without an end");
      const char c = text_[at_];
      const bool signed_end = (c == '-' || (c == '+' && end == "%}")) && has(at_ + 1, end);
      if (open.empty() && (signed_end || has(at_, end))) return finish(end, signed_end ? c : ' ');
      if (is_digit(c)) {
        number();
      } else if (begins_name(c)) {
        name();
      } else if (c == '"' || c == '\'') {
        string();
      } else {
        symbol(open);
      }
    }
  }

  void finish(const std::string& end, char sign) {
    tokens_.push_back({Token::Kind::kClose, end});
    const std::size_t place = at_ + (sign == ' ' ? 0 : 1);
    // A variable does not take the line end after it.
    close(place, end == "}}" && sign == ' ' ? '+' : sign);
  }

  void name() {
    const std::size_t begin = at_;
    while (at_ < text_.size() && in_name(text_[at_])) ++at_;
    tokens_.push_back({Token::Kind::kName, text_.substr(begin, at_ - begin)});
  }

  void number() {
    const std::size_t begin = at_;
    const auto digits = [&] {
      while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    };
    digits();
    const auto digit_at = [&](std::size_t at) { return at < text_.size() && is_digit(text_[at]); };
    bool whole = !has(at_, ".") || !digit_at(at_ + 1);
    if (!whole) {
      ++at_;
      digits();
    }
    const bool is_signed = has(at_ + 1, "-") || has(at_ + 1, "+");
    if (has(at_, "e") && digit_at(at_ + (is_signed ? 2 : 1))) {
      whole = false;
      at_ += is_signed ? 2 : 1;
      digits();
    }
    if (at_ < text_.size() && in_name(text_[at_])) throw not_known("the number " + shown(text_.substr(begin, 20)));
    const std::string text = text_.substr(begin, at_ - begin);
    if (whole && text.size() > 1 && text[0] == '0') throw not_known("the number " + shown(text.substr(0, 20)));
    tokens_.push_back({whole ? Token::Kind::kInteger : Token::Kind::kFloat, text});
  }

  void string() {
    const char quote = text_[at_++];
    std::string out;
    while (at_ < text_.size() && text_[at_] != quote) {
      if (text_[at_] == '\\') {
        escape(out);
      } else {
        out += text_[at_++];
      }
    }
    if (at_ >= text_.size()) throw wrong("a string without an end");
    ++at_;
    tokens_.push_back({Token::Kind::kString, std::move(out)});
  }

  // An escape as in Python; one that it does not know stays as it is.
  void escape(std::string& out) {
    const char kind = at_ + 1 < text_.size() ? text_[at_ + 1] : ' ';
    constexpr std::string_view kNames = "\\'\"abfnrtv", kMeant = "\\'\"\a\b\f\n\r\t\v";
    if (const std::size_t found = kNames.find(kind); found != std::string_view::npos) {
      out += kMeant[found];
      at_ += 2;
    } else if (kind == 'x' || kind == 'u' || kind == 'U') {
      out += hexadecimal(kind == 'x' ? 2 : kind == 'u' ? 4 : 8);
    } else if (kind == '\n' || kind == 'N' || is_digit(kind) || static_cast<unsigned char>(kind) > 0x7f) {
      throw not_known("the escape " + shown(text_.substr(at_, 2)));
    } else {
      out += text_[at_++];
    }
  }

  std::string hexadecimal(std::size_t digits) {
    char32_t code = 0;
    for (std::size_t i = 0; i < digits; ++i) {
      const std::size_t place = at_ + 2 + i;
      const int value = place < text_.size() ? hex_value(text_[place]) : -1;
      if (value < 0 || code > 0x10ffff) throw wrong("a damaged escape in a string");
      code = code << 4 | static_cast<char32_t>(value);
    }
    if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) throw not_known("half a surrogate pair");
    at_ += 2 + digits;
    std::string out;
    append(out, code);
    return out;
  }

  void symbol(std::vector<char>& open) {
    constexpr std::array<std::string_view, 6> kPairs = {"//", "**", "==", "!=", ">=", "<="};
    for (const std::string_view pair : kPairs) {
      if (!has(at_, pair)) continue;
      tokens_.push_back({Token::Kind::kOperator, std::string(pair)});
      at_ += 2;
      return;
    }
    const char c = text_[at_];
    if (c == '(' || c == '[' || c == '{') open.push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c) throw wrong(std::string("an unexpected ") + c);
      open.pop_back();
    }
    if (std::string_view("+-/*%~[](){}><=.:|,;").find(c) == std::string_view::npos) {
      throw wrong("the character " + shown(text_.substr(at_, length_at(text_, at_))));
    }
    tokens_.push_back({Token::Kind::kOperator, std::string(1, c)});
    ++at_;
  }

  std::string text_;
  std::size_t at_ = 0;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> template_tokens(std::string_view source) { return Lexer(with_plain_lines(source)).run(); }

}  // namespace dynexport::text
