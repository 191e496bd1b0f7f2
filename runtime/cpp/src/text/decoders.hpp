// Decoders of a tokenizer.json: the texts of tokens to text.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace dynexport::text {

using Pieces = std::vector<std::string>;
using Decoder = std::function<Pieces(Pieces)>;

// A decoder, and whether it cleans spaces up: the end of a text may change once more text follows.
struct Decoding {
  Decoder decode;
  bool cleans_up = false;
};

// Returns the decoder of a description; null joins tokens with spaces. Throws Error for one that is not known.
Decoding read_decoder(const nlohmann::json& description, const std::string& where);

}  // namespace dynexport::text
