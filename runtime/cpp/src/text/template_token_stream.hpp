// The tokens of a chat template, for its parser.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/template_lexer.hpp"
#include "text/template_parser.hpp"

namespace dynexport::text {

constexpr int kDeepestTemplate = 200;  // of the tree, and of calls of the parser

// A list of tokens that is read from its beginning, and makes nodes of the tree.
class TokenStream {
 public:
  explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

 protected:
  using Kind = Node::Kind;
  using Is = Token::Kind;
  using Made = std::unique_ptr<Node>;

  // Counts calls that are under way, for a limit of the depth.
  class Level {
   public:
    explicit Level(TokenStream& parser) : parser_(parser) {
      if (++parser_.level_ > kDeepestTemplate) throw not_known("so deep a template");
    }
    ~Level() { --parser_.level_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    TokenStream& parser_;
  };

  static Error wrong(const std::string& what) {
    return Error("chat_template.jinja: expected a Jinja template, found " + what);
  }

  const Token& now() const { return tokens_[at_]; }
  const Token& after() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  bool is(Is kind, std::string_view text) const { return now().kind == kind && now().text == text; }
  bool is_operator(std::string_view text) const { return is(Is::kOperator, text); }
  bool is_name(std::string_view text) const { return is(Is::kName, text); }

  Token take() {
    Token token = now();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }

  bool take_if(Is kind, std::string_view text) {
    if (!is(kind, text)) return false;
    take();
    return true;
  }

  void expect(Is kind, std::string_view text) {
    if (!take_if(kind, text)) throw wrong(shown(now().text) + " where " + shown(text) + " should be");
  }

  std::string expect_name() {
    if (now().kind != Is::kName) throw wrong(shown(now().text) + " where a name should be");
    return take().text;
  }

  static Made node(Kind kind, std::string text = "") {
    auto made = std::make_unique<Node>();
    made->kind = kind;
    made->text = std::move(text);
    return made;
  }

  // Adds a part, which may be missing.
  static void add(Node& parent, NodePtr part) {
    if (part != nullptr) deepen(parent, *part);
    parent.parts.push_back(std::move(part));
  }

  static void deepen(Node& parent, const Node& part) {
    parent.depth = std::max(parent.depth, part.depth + 1);
    if (parent.depth > kDeepestTemplate) throw not_known("so deep a template");
  }

  template <typename... Parts>
  static Made node_of(Kind kind, std::string text, Parts... parts) {
    Made made = node(kind, std::move(text));
    (add(*made, std::move(parts)), ...);
    return made;
  }

 private:
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int level_ = 0;
};

}  // namespace dynexport::text
