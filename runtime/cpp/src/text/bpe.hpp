// Byte pair encoding: pairs of tokens are merged in the order of their ranks.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "text/model.hpp"

namespace dynexport::text {

class Bpe : public Model {
 public:
  explicit Bpe(const Fields& description);

  void encode(const std::string& word, std::vector<TokenId>& ids) const override;
  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  struct Merge {
    std::uint32_t rank = 0;
    TokenId id = 0;
  };
  // The words that were encoded before; a lock each, so that threads seldom wait.
  struct Shard {
    std::mutex lock;
    std::unordered_map<std::string, std::vector<TokenId>> words;
  };
  static constexpr std::size_t kShards = 16;

  void read_merges(const Fields& description);
  void add_merge(const std::string& left, const std::string& right, const std::string& where);
  std::vector<TokenId> symbols_of(const std::string& word) const;
  std::vector<TokenId> merged(const std::vector<TokenId>& symbols) const;
  const Merge* merge(TokenId left, TokenId right) const;

  Vocabulary vocabulary_;
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::array<std::optional<TokenId>, 256> bytes_;  // with byte fallback, the tokens <0x00> to <0xFF>
  bool whole_words_ = false, fuse_unknown_ = false;
  std::optional<TokenId> unknown_;
  mutable std::array<Shard, kShards> cache_;
};

}  // namespace dynexport::text
