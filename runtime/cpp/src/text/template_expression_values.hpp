// The values of a chat template's expressions.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/template_builtins.hpp"
#include "text/template_parser.hpp"
#include "text/template_value.hpp"

namespace dynexport::text {

constexpr int kDeepestCall = 800;  // of expressions, statements and calls of macros together

// Variables of a template, a loop's turn, a macro's call or a block; they hide those of ``outer``.
struct Scope {
  Scope* outer = nullptr;
  std::unordered_map<std::string, Value> values;
};

// Evaluates expressions in a scope, with limited steps, memory and depth.
class ExpressionEvaluator {
 public:
  // The variables must outlive it.
  explicit ExpressionEvaluator(const Dict& variables) : variables_(variables) {}

 protected:
  // Counts nested evaluations and calls.
  class Level {
   public:
    explicit Level(int& level) : level_(level) {
      if (++level_ > kDeepestCall) {
        --level_;
        throw template_failed("it calls macros, or nests, too deep");
      }
    }
    ~Level() { --level_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    int& level_;
  };

  Value name(const std::string& wanted) const;
  Value value(const Node& node);

  Scope root_;
  Scope* scope_ = &root_;
  Budget budget_;
  int level_ = 0;

 private:
  Value operation(const Node& node);
  std::vector<Value> values(const Node& node, std::size_t first = 0);
  Value dict(const Node& node);
  Value sliced(const Node& node);
  Arguments arguments(const Node& node);
  Value called(const Node& node);
  Value call(const Value& callee, const Node& node);
  Value filtered(const Node& node);
  Value tested(const Node& node);
  Value either(const Node& node);
  Value comparison(const Node& node);
  bool holds(const std::string& operation, const Value& left, const Value& right);
  Value signed_value(const Node& node);
  Value concatenation(const Node& node);

  const Dict& variables_;
};

}  // namespace dynexport::text
