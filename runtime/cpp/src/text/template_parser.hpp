// The syntax tree of a chat template.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/template_value.hpp"

namespace dynexport::text {

struct Node;
using NodePtr = std::unique_ptr<const Node>;

// An expression or a statement. ``text`` is a name or an operator; ``parts`` are what it consists of.
struct Node {
  enum class Kind {
    kConstant,     // value
    kName,         // text
    kList,         // parts
    kTuple,        // parts
    kDict,         // parts: keys and values in turn
    kAttribute,    // parts[0].text
    kItem,         // parts[0][parts[1]]
    kSlice,        // parts[0][parts[1]:parts[2]:parts[3]]; any but the first may be missing
    kCall,         // parts[0](parts[1..], named)
    kFilter,       // parts[0] | text(parts[1..], named)
    kTest,         // parts[0] is text(parts[1..], named)
    kNot,          // parts[0]
    kAnd,          // parts
    kOr,           // parts
    kCompare,      // parts[0] operators[0] parts[1] ..
    kBinary,       // parts[0] text parts[1]
    kSign,         // text parts[0]
    kConcat,       // parts
    kConditional,  // parts[1] if parts[0] else parts[2], which may be missing
    kText,         // text of the template
    kOutput,       // parts[0]
    kBlock,        // parts: statements
    kIf,           // parts: conditions and blocks in turn; a block for "else" at the end
    kFor,          // parts: target, iterated, condition, body, "else"; some may be missing
    kSet,          // parts: target, value
    kSetBlock,     // text = parts[0]
    kMacro,        // text(operators: parameters); parts[0] is the body, the others are the last ones' defaults
    kGeneration,   // parts[0]
    kBreak,
    kContinue,
    kField,  // text of a namespace operators[0], as a target
  };
  Kind kind = Kind::kBlock;
  std::string text;
  Value value;
  std::vector<NodePtr> parts;
  std::vector<std::pair<std::string, NodePtr>> named;
  std::vector<std::string> operators;
  int depth = 1;
};

// Parses a template. Throws Error for syntax that is wrong or not known.
NodePtr parse_template(std::string_view source);

}  // namespace dynexport::text
