// Pre-tokenizers of a tokenizer.json: they split text into words, which are encoded one by one.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace dynexport::text {

struct Word {
  std::string text;
  bool first = false;  // whether it begins the whole text
};

using Words = std::vector<Word>;
using PreTokenizer = std::function<Words(Words)>;

// Returns the pre-tokenizer of a description, which may be null. Throws Error for one that is not known.
PreTokenizer read_pre_tokenizer(const nlohmann::json& description, const std::string& where);

}  // namespace dynexport::text
