// The tokens of a chat template, as Jinja cuts them with trim_blocks and lstrip_blocks.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dynexport::text {

struct Token {
  enum class Kind { kText, kOpen, kClose, kName, kString, kInteger, kFloat, kOperator, kEnd };
  Kind kind = Kind::kEnd;
  std::string text;  // of an opening or closing token, "{{" or "{%" and "}}" or "%}"
};

// Throws Error for text that is no template.
std::vector<Token> template_tokens(std::string_view source);

}  // namespace dynexport::text
