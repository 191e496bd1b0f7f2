// The texts of token ids, and the ids of texts.
#include "text/vocabulary.hpp"

#include <utility>

namespace dynexport::text {

Vocabulary::Vocabulary(std::vector<std::optional<std::string>> texts) : texts_(std::move(texts)) {
  ids_.reserve(texts_.size());
  for (std::size_t id = 0; id < texts_.size(); ++id) {
    if (texts_[id]) ids_.emplace(*texts_[id], static_cast<TokenId>(id));
  }
}

std::optional<TokenId> Vocabulary::find(std::string_view text) const {
  const auto found = ids_.find(text);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

const std::string* Vocabulary::text(std::int64_t id) const {
  if (id < 0 || id >= static_cast<std::int64_t>(texts_.size()) || !texts_[static_cast<std::size_t>(id)]) return nullptr;
  return &*texts_[static_cast<std::size_t>(id)];
}

}  // namespace dynexport::text
