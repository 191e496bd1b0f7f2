// The model of a tokenizer: it turns a word into tokens.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "text/fields.hpp"
#include "text/vocabulary.hpp"

namespace dynexport::text {

// Immutable but for caches; threads may share it.
class Model {
 public:
  virtual ~Model() = default;
  virtual void encode(const std::string& word, std::vector<TokenId>& ids) const = 0;
  virtual const Vocabulary& vocabulary() const = 0;
};

// Throws Error for a model that is not known, or is damaged.
std::unique_ptr<const Model> read_model(const Fields& description);

}  // namespace dynexport::text
