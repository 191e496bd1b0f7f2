// Runs a chat template on variables, with limited steps, memory and depth.
#include "text/template_evaluator.hpp"

#include <unordered_map>
#include <utility>

#include "text/python_text.hpp"
#include "text/template_builtins.hpp"

namespace dynexport::text {

namespace {

using Kind = Node::Kind;

constexpr int kDeepest = 800;  // of expressions, statements and calls of macros together
constexpr std::int64_t kMostCharacters = 16 << 20;

// Variables of a template, a loop's turn, a macro's call or a block; they hide those of ``outer``.
struct Scope {
  Scope* outer = nullptr;
  std::unordered_map<std::string, Value> values;
};

enum class Flow { kNext, kBreak, kContinue };

class Evaluator {
 public:
  explicit Evaluator(const Dict& variables) : variables_(variables) {}

  std::string run(const Node& root) {
    std::string text = captured(root, root_);
    if (character_count(text) > kMostCharacters) throw template_failed("it makes more than 16 Mi characters");
    return text;
  }

 private:
  class Level {
   public:
    explicit Level(int& level) : level_(level) {
      if (++level_ > kDeepest) {
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

  // Sets a variable of the evaluator for a while.
  template <typename T>
  class Instead {
   public:
    Instead(T& place, T value) : place_(place), before_(std::exchange(place, value)) {}
    ~Instead() { place_ = before_; }
    Instead(const Instead&) = delete;
    Instead& operator=(const Instead&) = delete;

   private:
    T& place_;
    T before_;
  };

  // ---- statements

  // The text that a block makes in a scope.
  std::string captured(const Node& block, Scope& scope) {
    std::string text;
    const Instead<std::string*> output(output_, &text);
    const Instead<Scope*> current(scope_, &scope);
    run_node(block);
    return text;
  }

  void write(const std::string& text) {
    budget_.bytes(text.size());
    *output_ += text;
  }

  Flow run_node(const Node& node) {
    const Level level(level_);
    budget_.step();
    switch (node.kind) {
      case Kind::kBlock:
        return run_block(node);
      case Kind::kText:
        write(node.text);
        return Flow::kNext;
      case Kind::kOutput:
        write(shown_text(value(*node.parts[0]), budget_));
        return Flow::kNext;
      case Kind::kIf:
        return run_if(node);
      case Kind::kFor:
        run_for(node);
        return Flow::kNext;
      case Kind::kBreak:
        return Flow::kBreak;
      case Kind::kContinue:
        return Flow::kContinue;
      default:
        run_assignment(node);
        return Flow::kNext;
    }
  }

  void run_assignment(const Node& node) {
    if (node.kind == Kind::kSet) {
      assign(*node.parts[0], value(*node.parts[1]));
    } else if (node.kind == Kind::kMacro) {
      scope_->values[node.text] = macro(node);
    } else {  // a block of set, or of generation
      Scope inner{scope_, {}};
      std::string text = captured(*node.parts[0], inner);
      if (node.kind == Kind::kGeneration) {
        write(text);
      } else {
        scope_->values[node.text] = Value::of(std::move(text));
      }
    }
  }

  Flow run_block(const Node& node) {
    for (const NodePtr& part : node.parts) {
      const Flow flow = run_node(*part);
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Flow run_if(const Node& node) {
    for (std::size_t i = 0; i + 1 < node.parts.size(); i += 2) {
      if (is_true(value(*node.parts[i]))) return run_node(*node.parts[i + 1]);
    }
    return node.parts.size() % 2 == 0 ? Flow::kNext : run_node(*node.parts.back());
  }

  // The values of a loop that its condition accepts.
  std::vector<Value> loop_values(const Node& node) {
    std::vector<Value> values = iterated(value(*node.parts[1]), budget_);
    if (node.parts[2] == nullptr) return values;
    std::vector<Value> accepted;
    for (Value& one : values) {
      Scope inner{scope_, {}};
      const Instead<Scope*> current(scope_, &inner);
      assign(*node.parts[0], one);
      if (is_true(value(*node.parts[2]))) accepted.push_back(std::move(one));
    }
    return accepted;
  }

  void run_for(const Node& node) {
    const auto values = std::make_shared<const std::vector<Value>>(loop_values(node));
    if (values->empty()) {
      Scope inner{scope_, {}};
      const Instead<Scope*> current(scope_, &inner);
      if (node.parts[4] != nullptr) run_node(*node.parts[4]);
      return;
    }
    for (std::size_t i = 0; i < values->size(); ++i) {
      Scope inner{scope_, {}};
      const Instead<Scope*> current(scope_, &inner);
      budget_.step();
      inner.values["loop"] = Value::of(std::make_shared<const Loop>(Loop{values, i, 1}));
      assign(*node.parts[0], (*values)[i]);
      if (run_node(*node.parts[3]) == Flow::kBreak) return;
    }
  }

  void assign(const Node& target, Value given) {
    if (target.kind == Kind::kName) {
      scope_->values[target.text] = std::move(given);
    } else if (target.kind == Kind::kField) {
      const Value space = name(target.operators[0]);
      const auto* found = space.as<std::shared_ptr<Namespace>>();
      if (found == nullptr) throw template_failed("cannot assign attribute on non-namespace object");
      (*found)->fields.set(target.text, std::move(given));
    } else {
      const std::vector<Value> values = iterated(given, budget_);
      if (values.size() != target.parts.size()) {
        throw template_failed("expected " + std::to_string(target.parts.size()) + " values to unpack, found " +
                              std::to_string(values.size()));
      }
      for (std::size_t i = 0; i < values.size(); ++i) assign(*target.parts[i], values[i]);
    }
  }

  // A macro cannot outlive the scope that it was made in: no list or namespace holds functions.
  Value macro(const Node& node) {
    auto function = std::make_shared<Function>();
    function->call = [this, &node, outer = scope_](const Arguments& arguments) {
      const Level level(level_);
      Scope inner{outer, {}};
      bind(node, arguments, inner);
      return Value::of(captured(*node.parts[0], inner));
    };
    return Value::of(std::shared_ptr<const Function>(std::move(function)));
  }

  void bind(const Node& node, const Arguments& arguments, Scope& inner) {
    const auto& names = node.operators;
    const std::size_t defaults = node.parts.size() - 1;
    if (arguments.given.size() > names.size()) {
      throw template_failed("macro " + python_repr(node.text) + " takes not more than " + std::to_string(names.size()) +
                            " argument(s)");
    }
    for (const auto& [name, given] : arguments.named) {
      bool is_known = false;
      for (std::size_t i = arguments.given.size(); i < names.size(); ++i) is_known = is_known || names[i] == name;
      if (!is_known) {
        throw template_failed("macro " + python_repr(node.text) + " takes no keyword argument " + python_repr(name));
      }
    }
    const Instead<Scope*> current(scope_, &inner);
    for (std::size_t i = 0; i < names.size(); ++i) {
      const Value* given = arguments.find(static_cast<int>(i), names[i]);
      const std::size_t required = names.size() - defaults;
      if (given != nullptr) {
        inner.values[names[i]] = *given;
      } else if (i >= required) {
        inner.values[names[i]] = value(*node.parts[1 + i - required]);
      } else {
        inner.values[names[i]] = Value::undefined("parameter " + python_repr(names[i]) + " was not provided");
      }
    }
  }

  // ---- expressions

  Value name(const std::string& wanted) const {
    for (const Scope* scope = scope_; scope != nullptr; scope = scope->outer) {
      const auto found = scope->values.find(wanted);
      if (found != scope->values.end()) return found->second;
    }
    const Value* given = variables_.find(wanted);
    return given == nullptr ? global(wanted) : *given;
  }

  Value value(const Node& node) {
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

  Value operation(const Node& node) {
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

  std::vector<Value> values(const Node& node, std::size_t first = 0) {
    std::vector<Value> out;
    for (std::size_t i = first; i < node.parts.size(); ++i) out.push_back(value(*node.parts[i]));
    budget_.bytes(out.size() * sizeof(Value));
    return out;
  }

  Value dict(const Node& node) {
    Dict made;
    for (std::size_t i = 0; i + 1 < node.parts.size(); i += 2) {
      const Value key = value(*node.parts[i]);
      if (key.text() == nullptr) throw not_known("a key that is no text");
      made.set(*key.text(), value(*node.parts[i + 1]));
    }
    return Value::of(std::move(made));
  }

  Value sliced(const Node& node) {
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

  Arguments arguments(const Node& node) {
    Arguments found{values(node, 1), {}};
    for (const auto& [name, part] : node.named) found.named.emplace_back(name, value(*part));
    return found;
  }

  Value called(const Node& node) {
    const Node& callee = *node.parts[0];
    if (callee.kind == Kind::kAttribute) {
      const Value owner = value(*callee.parts[0]);
      if (has_method(owner, callee.text)) return call_method(owner, callee.text, arguments(node), budget_);
      return call(attribute(owner, callee.text), node);
    }
    return call(value(callee), node);
  }

  Value call(const Value& callee, const Node& node) {
    if (const auto* undefined = callee.as<Undefined>()) throw template_failed(undefined->why);
    const auto* function = callee.as<std::shared_ptr<const Function>>();
    if (function == nullptr) throw template_failed("'" + callee.type() + "' object is not callable");
    return (*function)->call(arguments(node));
  }

  Value filtered(const Node& node) {
    const Value given = value(*node.parts[0]);
    return call_filter(node.text, given, arguments(node), budget_);
  }

  Value tested(const Node& node) {
    const Value given = value(*node.parts[0]);
    return Value::of(call_test(node.text, given, arguments(node), budget_));
  }

  Value either(const Node& node) {
    const bool wanted = node.kind == Kind::kOr;
    Value found;
    for (const NodePtr& part : node.parts) {
      found = value(*part);
      if (is_true(found) == wanted) return found;
    }
    return found;
  }

  Value comparison(const Node& node) {
    Value left = value(*node.parts[0]);
    for (std::size_t i = 0; i < node.operators.size(); ++i) {
      Value right = value(*node.parts[i + 1]);
      if (!holds(node.operators[i], left, right)) return Value::of(false);
      left = std::move(right);
    }
    return Value::of(true);
  }

  bool holds(const std::string& operation, const Value& left, const Value& right) {
    if (operation == "==") return equal(left, right, budget_);
    if (operation == "!=") return !equal(left, right, budget_);
    if (operation == "in") return contains(right, left, budget_);
    if (operation == "not in") return !contains(right, left, budget_);
    const int order = compared(left, right, budget_);
    return operation == "<" ? order < 0 : operation == "<=" ? order <= 0 : operation == ">" ? order > 0 : order >= 0;
  }

  Value signed_value(const Node& node) {
    const Value given = value(*node.parts[0]);
    if (node.text == "-") return negative(given);
    if (!given.number()) throw not_known("a sign before a " + given.type());
    return given;
  }

  Value concatenation(const Node& node) {
    std::string text;
    for (const NodePtr& part : node.parts) text += shown_text(value(*part), budget_);
    return Value::of(std::move(text));
  }

  const Dict& variables_;
  Scope root_;
  Scope* scope_ = &root_;
  std::string* output_ = nullptr;
  Budget budget_;
  int level_ = 0;
};

}  // namespace

std::string rendered(const Node& root, const Dict& variables) { return Evaluator(variables).run(root); }

}  // namespace dynexport::text
