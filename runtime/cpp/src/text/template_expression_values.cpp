// The values of a chat template's expressions.
#include "text/template_expression_values.hpp"

#include "text/python_text.hpp"

namespace dynexport::text {

using Kind = Node::Kind;

Value ExpressionEvaluator::name(const std::string& wanted) const {
  for (const Scope* scope = scope_; scope != nullptr; scope = scope->outer) {
    const auto found = scope->values.find(wanted);
    if (found != scope->values.end()) return found->second;
  }
  const Value* given = variables_.find(wanted);
  return given == nullptr ? global(wanted) : *given;
}

Value ExpressionEvaluator::value(const Node& node) {
  const Level level(level_);
  budget_.step();
  switch (node.kind) {
    case Kind::kConstant:
      return node.value;
    case Kind::kName:
      return name(node.text);
    case Kind::kList:
    case Kind::kTuple:
      return Value::of(values(node), node.kind == Kind::kList ? Items::Kind::kList : Items::Kind::kTuple);
    case Kind::kDict:
      return dict(node);
    case Kind::kAttribute:
      return attribute(value(*node.parts[0]), node.text);
    case Kind::kItem:
      return item(value(*node.parts[0]), value(*node.parts[1]));
    case Kind::kSlice:
      return sliced(node);
    case Kind::kCall:
      return called(node);
    case Kind::kFilter:
      return filtered(node);
    case Kind::kTest:
      return tested(node);
    default:
      return operation(node);
  }
}

Value ExpressionEvaluator::operation(const Node& node) {
  switch (node.kind) {
    case Kind::kNot:
      return Value::of(!is_true(value(*node.parts[0])));
    case Kind::kAnd:
    case Kind::kOr:
      return either(node);
    case Kind::kCompare:
      return comparison(node);
    case Kind::kBinary: {
      const Value left = value(*node.parts[0]);
      return binary(node.text, left, value(*node.parts[1]), budget_);
    }
    case Kind::kSign:
      return signed_value(node);
    case Kind::kConcat:
      return concatenation(node);
    case Kind::kConditional:
      if (is_true(value(*node.parts[0]))) return value(*node.parts[1]);
      if (node.parts[2] != nullptr) return value(*node.parts[2]);
      return Value::undefined("the inline if-expression evaluated to false and no else section was defined.");
    default:
      throw not_known("such an expression");
  }
}

std::vector<Value> ExpressionEvaluator::values(const Node& node, std::size_t first) {
  std::vector<Value> out;
  for (std::size_t i = first; i < node.parts.size(); ++i) out.push_back(value(*node.parts[i]));
  budget_.bytes(out.size() * sizeof(Value));
  return out;
}

Value ExpressionEvaluator::dict(const Node& node) {
  Dict made;
  for (std::size_t i = 0; i + 1 < node.parts.size(); i += 2) {
    const Value key = value(*node.parts[i]);
    if (key.text() == nullptr) throw not_known("a key that is no text");
    made.set(*key.text(), value(*node.parts[i + 1]));
  }
  return Value::of(std::move(made));
}

Value ExpressionEvaluator::sliced(const Node& node) {
  const Value whole = value(*node.parts[0]);
  Value ends[3];
  const Value* given[3] = {};
  for (std::size_t i = 0; i < 3; ++i) {
    if (node.parts[i + 1] == nullptr) continue;
    ends[i] = value(*node.parts[i + 1]);
    given[i] = &ends[i];
  }
  return slice(whole, given[0], given[1], given[2], budget_);
}

Arguments ExpressionEvaluator::arguments(const Node& node) {
  Arguments found{values(node, 1), {}};
  for (const auto& [name, part] : node.named) found.named.emplace_back(name, value(*part));
  return found;
}

Value ExpressionEvaluator::called(const Node& node) {
  const Node& callee = *node.parts[0];
  if (callee.kind == Kind::kAttribute) {
    const Value owner = value(*callee.parts[0]);
    if (has_method(owner, callee.text)) return call_method(owner, callee.text, arguments(node), budget_);
    return call(attribute(owner, callee.text), node);
  }
  return call(value(callee), node);
}

Value ExpressionEvaluator::call(const Value& callee, const Node& node) {
  if (const auto* undefined = callee.as<Undefined>()) throw template_failed(undefined->why);
  const auto* function = callee.as<std::shared_ptr<const Function>>();
  if (function == nullptr) throw template_failed("'" + callee.type() + "' object is not callable");
  return (*function)->call(arguments(node));
}

Value ExpressionEvaluator::filtered(const Node& node) {
  const Value given = value(*node.parts[0]);
  return call_filter(node.text, given, arguments(node), budget_);
}

Value ExpressionEvaluator::tested(const Node& node) {
  const Value given = value(*node.parts[0]);
  return Value::of(call_test(node.text, given, arguments(node), budget_));
}

Value ExpressionEvaluator::either(const Node& node) {
  const bool wanted = node.kind == Kind::kOr;
  Value found;
  for (const NodePtr& part : node.parts) {
    found = value(*part);
    if (is_true(found) == wanted) return found;
  }
  return found;
}

Value ExpressionEvaluator::comparison(const Node& node) {
  Value left = value(*node.parts[0]);
  for (std::size_t i = 0; i < node.operators.size(); ++i) {
    Value right = value(*node.parts[i + 1]);
    if (!holds(node.operators[i], left, right)) return Value::of(false);
    left = std::move(right);
  }
  return Value::of(true);
}

bool ExpressionEvaluator::holds(const std::string& operation, const Value& left, const Value& right) {
  if (operation == "==") return equal(left, right, budget_);
  if (operation == "!=") return !equal(left, right, budget_);
  if (operation == "in") return contains(right, left, budget_);
  if (operation == "not in") return !contains(right, left, budget_);
  const int order = compared(left, right, budget_);
  return operation == "<" ? order < 0 : operation == "<=" ? order <= 0 : operation == ">" ? order > 0 : order >= 0;
}

Value ExpressionEvaluator::signed_value(const Node& node) {
  Value given = value(*node.parts[0]);
  if (node.text == "-") return negative(given);
  if (!given.number()) throw not_known("a sign before a " + given.type());
  return given;
}

Value ExpressionEvaluator::concatenation(const Node& node) {
  std::string text;
  for (const NodePtr& part : node.parts) text += shown_text(value(*part), budget_);
  return Value::of(std::move(text));
}

}  // namespace dynexport::text
