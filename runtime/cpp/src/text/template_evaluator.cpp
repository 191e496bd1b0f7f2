// Runs a chat template on variables.
#include "text/template_evaluator.hpp"

#include <memory>
#include <utility>

#include "text/python_text.hpp"
#include "text/template_builtins.hpp"
#include "text/template_expression_values.hpp"

namespace dynexport::text {

namespace {

using Kind = Node::Kind;

constexpr std::int64_t kMostCharacters = 16 << 20;

enum class Flow { kNext, kBreak, kContinue };

// Runs statements; their text goes to ``output_``.
class Evaluator : private ExpressionEvaluator {
 public:
  using ExpressionEvaluator::ExpressionEvaluator;

  std::string run(const Node& root) {
    std::string text = captured(root, root_);
    if (character_count(text) > kMostCharacters) throw template_failed("it makes more than 16 Mi characters");
    return text;
  }

 private:
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

  std::string* output_ = nullptr;
};

}  // namespace

std::string rendered(const Node& root, const Dict& variables) { return Evaluator(variables).run(root); }

}  // namespace dynexport::text
