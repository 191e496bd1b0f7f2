// The parser of chat templates.
#include "text/template_parser.hpp"

#include <algorithm>
#include <initializer_list>

#include "text/template_expressions.hpp"
#include "text/template_lexer.hpp"

namespace dynexport::text {

namespace {

constexpr std::size_t kLongest = 1 << 20;

// The statements of a list of tokens.
class Parser : private ExpressionParser {
 public:
  using ExpressionParser::ExpressionParser;

  NodePtr run() {
    NodePtr block = statements({});
    if (now().kind != Is::kEnd) throw wrong("an unexpected " + shown(now().text));
    return block;
  }

 private:
  bool at_end(std::initializer_list<std::string_view> ends) const {
    if (!is(Is::kOpen, "{%") || after().kind != Is::kName) return false;
    return std::find(ends.begin(), ends.end(), after().text) != ends.end();
  }

  // Statements up to a block with one of some names, of which the name is the next token then.
  NodePtr statements(std::initializer_list<std::string_view> ends) {
    const Level level(*this);
    Made block = node(Kind::kBlock);
    while (now().kind != Is::kEnd && !at_end(ends)) {
      if (now().kind == Is::kText) {
        add(*block, node(Kind::kText, take().text));
      } else if (take_if(Is::kOpen, "{{")) {
        add(*block, node_of(Kind::kOutput, "", tuple(true)));
        expect(Is::kClose, "}}");
      } else {
        expect(Is::kOpen, "{%");
        add(*block, statement());
      }
    }
    if (ends.size() > 0) expect(Is::kOpen, "{%");
    return block;
  }

  NodePtr ended(NodePtr made, std::string_view end) {
    expect(Is::kName, end);
    expect(Is::kClose, "%}");
    return made;
  }

  NodePtr statement() {
    const std::string name = expect_name();
    if (name == "if") return if_statement();
    if (name == "for") return for_statement();
    if (name == "set") return set_statement();
    if (name == "macro") return macro();
    if (name == "generation" || name == "break" || name == "continue") {
      expect(Is::kClose, "%}");
      if (name != "generation") return loop_control(name);
      const int loops = std::exchange(loops_, 0);
      NodePtr body = statements({"endgeneration"});
      loops_ = loops;
      return ended(node_of(Kind::kGeneration, "", std::move(body)), "endgeneration");
    }
    throw not_known("the statement " + shown(name));
  }

  NodePtr loop_control(const std::string& name) const {
    if (loops_ == 0) throw wrong(name + " outside of a loop");
    return node(name == "break" ? Kind::kBreak : Kind::kContinue);
  }

  NodePtr if_statement() {
    Made made = node(Kind::kIf);
    add(*made, tuple(false));
    for (;;) {
      expect(Is::kClose, "%}");
      add(*made, statements({"elif", "else", "endif"}));
      if (take_if(Is::kName, "elif")) {
        add(*made, tuple(false));
        continue;
      }
      if (take_if(Is::kName, "else")) {
        expect(Is::kClose, "%}");
        add(*made, statements({"endif"}));
      }
      return ended(std::move(made), "endif");
    }
  }

  NodePtr for_statement() {
    NodePtr target = assigned(false);
    expect(Is::kName, "in");
    NodePtr values = tuple(false), condition;
    if (take_if(Is::kName, "if")) condition = expression();
    if (is_name("recursive")) throw not_known("a recursive loop");
    expect(Is::kClose, "%}");
    ++loops_;
    NodePtr body = statements({"endfor", "else"});
    --loops_;
    NodePtr otherwise;
    if (take_if(Is::kName, "else")) {
      expect(Is::kClose, "%}");
      otherwise = statements({"endfor"});
    }
    return ended(node_of(Kind::kFor, "", std::move(target), std::move(values), std::move(condition), std::move(body),
                         std::move(otherwise)),
                 "endfor");
  }

  NodePtr set_statement() {
    NodePtr target = assigned(true);
    if (take_if(Is::kOperator, "=")) {
      NodePtr value = tuple(true);
      expect(Is::kClose, "%}");
      return node_of(Kind::kSet, "", std::move(target), std::move(value));
    }
    if (target->kind != Kind::kName || !is(Is::kClose, "%}")) throw not_known("such a block of set");
    take();
    const std::string name = target->text;
    return ended(node_of(Kind::kSetBlock, name, statements({"endset"})), "endset");
  }

  NodePtr macro() {
    Made made = node(Kind::kMacro, checked_target(expect_name()));
    std::vector<NodePtr> defaults;
    expect(Is::kOperator, "(");
    while (!is_operator(")")) {
      if (!made->operators.empty()) expect(Is::kOperator, ",");
      made->operators.push_back(checked_target(expect_name()));
      if (take_if(Is::kOperator, "=")) {
        defaults.push_back(expression());
      } else if (!defaults.empty()) {
        throw wrong("a parameter without a default after one with a default");
      }
    }
    take();
    expect(Is::kClose, "%}");
    const int loops = std::exchange(loops_, 0);
    add(*made, statements({"endmacro"}));
    loops_ = loops;
    for (NodePtr& value : defaults) add(*made, std::move(value));
    return ended(std::move(made), "endmacro");
  }

  // A name that may be assigned to.
  static std::string checked_target(std::string name) {
    for (const char* reserved :
         {"true", "false", "none", "True", "False", "None", "loop", "caller", "varargs", "kwargs"}) {
      if (name == reserved) throw not_known("an assignment to " + name);
    }
    return name;
  }

  NodePtr one_assigned(bool fields) {
    Made made = node(Kind::kName, checked_target(expect_name()));
    if (!fields || !take_if(Is::kOperator, ".")) return made;
    Made field = node(Kind::kField, expect_name());
    field->operators.push_back(made->text);
    return field;
  }

  // Names, or a field of a namespace.
  NodePtr assigned(bool fields) {
    const bool bracket = take_if(Is::kOperator, "(");
    NodePtr first = one_assigned(fields);
    if (is_operator(",")) {
      Made names = node_of(Kind::kTuple, "", std::move(first));
      while (take_if(Is::kOperator, ",") && now().kind == Is::kName && !is_name("in"))
        add(*names, one_assigned(fields));
      first = std::move(names);
    }
    if (bracket) expect(Is::kOperator, ")");
    return first;
  }

  int loops_ = 0;  // around the statement
};

}  // namespace

NodePtr parse_template(std::string_view source) {
  if (source.size() > 4 * kLongest) throw Error("chat_template.jinja: expected at most 1048576 characters");
  return Parser(template_tokens(source)).run();
}

}  // namespace dynexport::text
