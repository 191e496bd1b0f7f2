// Normalizers of a tokenizer.json: text to text, before it is split.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

namespace dynexport::text {

using Normalizer = std::function<std::string(std::string)>;

// Returns the normalizer of a description, which may be null. Throws Error for one that is not known.
Normalizer read_normalizer(const nlohmann::json& description, const std::string& where);

}  // namespace dynexport::text
