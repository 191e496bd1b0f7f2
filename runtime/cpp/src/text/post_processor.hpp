// Post-processors of a tokenizer.json: the special tokens around a text.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "text/vocabulary.hpp"

namespace dynexport::text {

// The tokens before and after a text.
struct Frame {
  std::vector<TokenId> before, after;
};

// Returns the frame of a description, which may be null. Throws Error for one that is not known.
Frame read_post_processor(const nlohmann::json& description, const std::string& where);

}  // namespace dynexport::text
