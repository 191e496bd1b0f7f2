// The parser of expressions in chat templates.
#pragma once

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/template_parser.hpp"
#include "text/template_token_stream.hpp"

namespace dynexport::text {

// The expressions of a list of tokens, with the precedence of Jinja's.
class ExpressionParser : protected TokenStream {
 public:
  using TokenStream::TokenStream;

 protected:
  // An expression, or several with commas, which are a tuple.
  NodePtr tuple(bool conditional) {
    NodePtr first = conditional ? expression() : or_expression();
    if (!is_operator(",")) return first;
    Made made = node_of(Kind::kTuple, "", std::move(first));
    while (take_if(Is::kOperator, ",")) {
      if (now().kind == Is::kClose || is_operator(")")) break;
      add(*made, conditional ? expression() : or_expression());
    }
    return made;
  }

  NodePtr expression() {
    const Level level(*this);
    NodePtr value = or_expression();
    while (take_if(Is::kName, "if")) {
      NodePtr condition = or_expression(), otherwise;
      if (take_if(Is::kName, "else")) otherwise = expression();
      value = node_of(Kind::kConditional, "", std::move(condition), std::move(value), std::move(otherwise));
    }
    return value;
  }

  NodePtr several(NodePtr (ExpressionParser::*next)(), Kind kind, std::string_view word) {
    NodePtr first = (this->*next)();
    const Is type = word == "~" ? Is::kOperator : Is::kName;
    if (!is(type, word)) return first;
    Made made = node_of(kind, "", std::move(first));
    while (take_if(type, word)) add(*made, (this->*next)());
    return made;
  }

  NodePtr or_expression() { return several(&ExpressionParser::and_expression, Kind::kOr, "or"); }
  NodePtr and_expression() { return several(&ExpressionParser::not_expression, Kind::kAnd, "and"); }

  NodePtr not_expression() {
    const Level level(*this);
    if (take_if(Is::kName, "not")) return node_of(Kind::kNot, "", not_expression());
    return comparison();
  }

  std::string comparison_operator() {
    for (const char* text : {"==", "!=", "<", "<=", ">", ">="}) {
      if (take_if(Is::kOperator, text)) return text;
    }
    if (take_if(Is::kName, "in")) return "in";
    if (!is_name("not") || after().kind != Is::kName || after().text != "in") return "";
    take();
    take();
    return "not in";
  }

  NodePtr comparison() {
    NodePtr first = sum();
    Made made;
    for (std::string found; !(found = comparison_operator()).empty();) {
      if (made == nullptr) made = node_of(Kind::kCompare, "", std::move(first));
      made->operators.push_back(found);
      add(*made, sum());
    }
    if (made != nullptr) return made;
    return first;
  }

  NodePtr binary(NodePtr (ExpressionParser::*next)(), std::initializer_list<const char*> operators) {
    NodePtr left = (this->*next)();
    for (;;) {
      const auto found = std::find_if(operators.begin(), operators.end(), [&](auto text) { return is_operator(text); });
      if (found == operators.end()) return left;
      take();
      NodePtr right = (this->*next)();
      left = node_of(Kind::kBinary, *found, std::move(left), std::move(right));
    }
  }

  NodePtr sum() { return binary(&ExpressionParser::concatenation, {"+", "-"}); }
  NodePtr concatenation() { return several(&ExpressionParser::product, Kind::kConcat, "~"); }
  NodePtr product() { return binary(&ExpressionParser::power, {"*", "/", "//", "%"}); }

  NodePtr power() {
    NodePtr value = unary(true);
    if (is_operator("**")) throw not_known("the operator **");
    return value;
  }

  NodePtr unary(bool filters) {
    const Level level(*this);
    NodePtr value;
    if (is_operator("-") || is_operator("+")) {
      const std::string sign = take().text;
      value = node_of(Kind::kSign, sign, unary(false));
    } else {
      value = primary();
    }
    value = postfix(std::move(value));
    return filters ? filtered(std::move(value)) : std::move(value);
  }

  NodePtr constant(Value value) {
    Made made = node(Kind::kConstant);
    made->value = std::move(value);
    return made;
  }

  NodePtr primary() {
    const Token token = take();
    if (token.kind == Is::kName) {
      if (token.text == "true" || token.text == "True") return constant(Value::of(true));
      if (token.text == "false" || token.text == "False") return constant(Value::of(false));
      if (token.text == "none" || token.text == "None") return constant(Value());
      return node(Kind::kName, token.text);
    }
    if (token.kind == Is::kString) {
      std::string text = token.text;
      while (now().kind == Is::kString) text += take().text;
      return constant(Value::of(std::move(text)));
    }
    if (token.kind == Is::kInteger) return constant(Value::of(number<std::int64_t>(token.text)));
    if (token.kind == Is::kFloat) return constant(Value::of(number<double>(token.text)));
    if (token.kind == Is::kOperator && token.text == "(") return parenthesis();
    if (token.kind == Is::kOperator && token.text == "[") return list();
    if (token.kind == Is::kOperator && token.text == "{") return dict();
    throw wrong("an unexpected " + shown(token.text));
  }

  template <typename T>
  static T number(const std::string& text) {
    T value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) throw not_known("the number " + shown(text));
    return value;
  }

  NodePtr parenthesis() {
    if (take_if(Is::kOperator, ")")) return node(Kind::kTuple);
    NodePtr value = tuple(true);
    expect(Is::kOperator, ")");
    return value;
  }

  NodePtr list() {
    Made made = node(Kind::kList);
    while (!is_operator("]")) {
      if (!made->parts.empty()) expect(Is::kOperator, ",");
      if (is_operator("]")) break;
      add(*made, expression());
    }
    take();
    return made;
  }

  NodePtr dict() {
    Made made = node(Kind::kDict);
    while (!is_operator("}")) {
      if (!made->parts.empty()) expect(Is::kOperator, ",");
      if (is_operator("}")) break;
      add(*made, expression());
      expect(Is::kOperator, ":");
      add(*made, expression());
    }
    take();
    return made;
  }

  NodePtr postfix(NodePtr value) {
    for (;;) {
      if (take_if(Is::kOperator, ".")) {
        if (now().kind == Is::kInteger) {
          value = node_of(Kind::kItem, "", std::move(value), constant(Value::of(number<std::int64_t>(take().text))));
        } else {
          value = node_of(Kind::kAttribute, expect_name(), std::move(value));
        }
      } else if (take_if(Is::kOperator, "[")) {
        value = subscript(std::move(value));
      } else if (is_operator("(")) {
        value = call(Kind::kCall, "", std::move(value));
      } else {
        return value;
      }
    }
  }

  NodePtr subscript(NodePtr value) {
    NodePtr first;
    if (!is_operator(":")) first = expression();
    if (take_if(Is::kOperator, "]") && first != nullptr)
      return node_of(Kind::kItem, "", std::move(value), std::move(first));
    Made slice = node_of(Kind::kSlice, "", std::move(value), std::move(first));
    while (slice->parts.size() < 4 && take_if(Is::kOperator, ":")) {
      add(*slice, is_operator(":") || is_operator("]") ? nullptr : expression());
    }
    if (slice->parts.size() < 3) throw not_known("such a subscript");
    while (slice->parts.size() < 4) add(*slice, nullptr);
    expect(Is::kOperator, "]");
    return slice;
  }

  // Arguments in brackets, if there are any.
  NodePtr call(Kind kind, std::string name, NodePtr value) {
    Made made = node_of(kind, std::move(name), std::move(value));
    if (!take_if(Is::kOperator, "(")) return made;
    bool any = false;
    while (!is_operator(")")) {
      if (any) expect(Is::kOperator, ",");
      if (any && is_operator(")")) break;
      any = true;
      if (is_operator("*") || is_operator("**")) throw not_known("an argument with *");
      if (now().kind == Is::kName && after().kind == Is::kOperator && after().text == "=") {
        std::string key = take().text;
        take();
        NodePtr argument = expression();
        deepen(*made, *argument);
        made->named.emplace_back(std::move(key), std::move(argument));
      } else if (!made->named.empty()) {
        throw wrong("an argument after one with a name");
      } else {
        add(*made, expression());
      }
    }
    take();
    return made;
  }

  NodePtr filtered(NodePtr value) {
    for (;;) {
      if (take_if(Is::kOperator, "|")) {
        value = call(Kind::kFilter, expect_name(), std::move(value));
      } else if (take_if(Is::kName, "is")) {
        value = test(std::move(value));
      } else if (is_operator("(")) {
        value = call(Kind::kCall, "", std::move(value));
      } else {
        return value;
      }
    }
  }

  NodePtr test(NodePtr value) {
    const bool negated = take_if(Is::kName, "not");
    std::string name = expect_name();
    NodePtr made;
    const bool word = now().kind == Is::kName && !is_name("else") && !is_name("or") && !is_name("and");
    if (is_operator("(")) {
      made = call(Kind::kTest, std::move(name), std::move(value));
    } else if (word || now().kind == Is::kString || now().kind == Is::kInteger || now().kind == Is::kFloat ||
               is_operator("[") || is_operator("{")) {
      if (is_name("is")) throw wrong("tests in a chain");
      made = node_of(Kind::kTest, std::move(name), std::move(value), postfix(primary()));
    } else {
      made = node_of(Kind::kTest, std::move(name), std::move(value));
    }
    return negated ? node_of(Kind::kNot, "", std::move(made)) : std::move(made);
  }
};

}  // namespace dynexport::text
