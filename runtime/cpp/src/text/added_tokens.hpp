// Added tokens: texts that are tokens wherever they stand, found before a text is split.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "text/fields.hpp"
#include "text/normalizers.hpp"
#include "text/vocabulary.hpp"

namespace dynexport::text {

struct AddedToken {
  TokenId id = 0;
  std::string content;
  bool single_word = false, strips_left = false, strips_right = false, normalized = false, special = false;
};

// A part of a text: a token, or text between tokens (id -1).
struct Segment {
  TokenId id = -1;
  std::size_t begin = 0, end = 0;
};

// Finds tokens in a text: the leftmost, of those the longest.
class TokenFinder {
 public:
  void add(const std::string& content, const AddedToken& token);
  std::vector<Segment> cut(std::string_view text) const;

 private:
  std::size_t longest_at(std::string_view text, std::size_t at, const AddedToken*& found) const;
  bool accepts(const AddedToken& token, std::string_view text, std::size_t begin, std::size_t end) const;

  std::vector<AddedToken> tokens_;
  std::vector<std::int32_t> ends_{-1};                         // by node of the tree: the token that ends there, or -1
  std::array<bool, 256> begins_{};                             // whether a token begins with the byte
  std::unordered_map<std::uint64_t, std::uint32_t> children_;  // by node and byte
};

// The added tokens of a tokenizer.json.
class AddedTokens {
 public:
  // Throws Error for tokens that are damaged, or whose ids the tokenizers library would change.
  AddedTokens(const Fields& tokenizer, const Vocabulary& vocabulary, const Normalizer& normalizer);

  const TokenFinder& as_written() const { return as_written_; }
  const TokenFinder& normalized() const { return normalized_; }
  // The text that decoding gives an added token, or null: the normalized one, for a token that is found there.
  const std::string* text(std::int64_t id) const;
  bool is_special(std::int64_t id) const { return special_ids_.count(id) != 0; }
  // Whether decoding leaves a text out with the special tokens. A special token that normalization changes stays.
  bool is_special(const std::string& text) const { return special_.count(text) != 0; }

 private:
  TokenFinder as_written_, normalized_;
  std::unordered_map<std::int64_t, std::string> texts_;
  std::unordered_set<std::string> special_;
  std::unordered_set<std::int64_t> special_ids_;
};

}  // namespace dynexport::text
