// The texts of token ids, and the ids of texts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace dynexport::text {

using TokenId = std::int32_t;

// More than any tokenizer has; ids are less than this.
constexpr std::int64_t kMostTokens = 1 << 22;

// Tokens by id. Complete after it was built; lookups do not allocate.
class Vocabulary {
 public:
  // ``texts`` by id; two tokens never have the same text, and an id without a token has none.
  explicit Vocabulary(std::vector<std::optional<std::string>> texts);
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;
  Vocabulary(const Vocabulary&) = delete;
  Vocabulary& operator=(const Vocabulary&) = delete;

  std::optional<TokenId> find(std::string_view text) const;
  // The text of an id, or null if there is none.
  const std::string* text(std::int64_t id) const;
  std::size_t size() const { return ids_.size(); }

 private:
  std::vector<std::optional<std::string>> texts_;
  std::unordered_map<std::string_view, TokenId> ids_;  // into texts_, whose entries never move
};

}  // namespace dynexport::text
