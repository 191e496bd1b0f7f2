// Added tokens, found as the tokenizers library does.
#include "text/added_tokens.hpp"

#include <algorithm>

#include "text/characters.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr std::size_t kLongestToken = 1 << 12, kMostAdded = 1 << 18, kMostBytes = 1 << 24;

std::uint64_t edge(std::uint32_t node, char byte) {
  return static_cast<std::uint64_t>(node) << 8 | static_cast<unsigned char>(byte);
}

AddedToken read_token(const Fields& part) {
  part.only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
  AddedToken token;
  token.id = static_cast<TokenId>(part.number("id", kMostTokens - 1));
  token.content = part.filled("content");
  if (token.content.size() > kLongestToken) {
    throw part.expected("content", "at most " + std::to_string(kLongestToken) + " bytes");
  }
  token.single_word = part.flag("single_word");
  token.strips_left = part.flag("lstrip");
  token.strips_right = part.flag("rstrip");
  token.special = part.flag("special");
  token.normalized = part.flag("normalized");
  return token;
}

// The tokenizers library gives added tokens ids by their texts, whatever the file says.
void check_id(const Fields& part, const AddedToken& token, const Vocabulary& vocabulary, std::int64_t next) {
  const auto known = vocabulary.find(token.content);
  const std::int64_t wanted = known ? *known : next;
  if (token.id != wanted) throw part.expected("id", std::to_string(wanted) + " for " + shown(token.content));
}

}  // namespace

void TokenFinder::add(const std::string& content, const AddedToken& token) {
  if (content.empty()) return;
  std::uint32_t node = 0;
  for (const char byte : content) {
    const auto [child, is_new] = children_.try_emplace(edge(node, byte), static_cast<std::uint32_t>(ends_.size()));
    if (is_new) ends_.push_back(-1);
    node = child->second;
  }
  if (ends_[node] >= 0) return;  // the first token of a text counts
  begins_[static_cast<unsigned char>(content.front())] = true;
  ends_[node] = static_cast<std::int32_t>(tokens_.size());
  tokens_.push_back(token);
}

std::size_t TokenFinder::longest_at(std::string_view text, std::size_t at, const AddedToken*& found) const {
  std::size_t longest = 0;
  std::uint32_t node = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    const auto child = children_.find(edge(node, text[i]));
    if (child == children_.end()) break;
    node = child->second;
    if (ends_[node] < 0) continue;
    found = &tokens_[static_cast<std::size_t>(ends_[node])];
    longest = i + 1 - at;
  }
  return longest;
}

bool TokenFinder::accepts(const AddedToken& token, std::string_view text, std::size_t begin, std::size_t end) const {
  if (!token.single_word) return true;
  return (begin == 0 || !is_word(code_at(text, start_before(text, begin)))) &&
         (end == text.size() || !is_word(code_at(text, end)));
}

std::vector<Segment> TokenFinder::cut(std::string_view text) const {
  std::vector<Segment> segments;
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size() && !tokens_.empty();) {
    const AddedToken* token = nullptr;
    const std::size_t length =
        begins_[static_cast<unsigned char>(text[at])] ? longest_at(text, at, token) : std::size_t{0};
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + length;
    at = end;
    if (!accepts(*token, text, begin, end)) continue;
    while (token->strips_left && begin > done && is_space(code_at(text, start_before(text, begin)))) {
      begin = start_before(text, begin);
    }
    while (token->strips_right && end < text.size() && is_space(code_at(text, end))) end += length_at(text, end);
    if (begin > done) segments.push_back({-1, done, begin});
    segments.push_back({token->id, begin, end});
    done = end;
  }
  if (done < text.size()) segments.push_back({-1, done, text.size()});
  return segments;
}

AddedTokens::AddedTokens(const Fields& tokenizer, const Vocabulary& vocabulary, const Normalizer& normalizer) {
  std::vector<AddedToken> tokens;
  if (tokenizer.has("added_tokens")) {
    auto next = static_cast<std::int64_t>(vocabulary.size());
    std::size_t bytes = 0;
    std::unordered_set<std::string> contents;
    for (const Fields& part : tokenizer.parts("added_tokens", kMostAdded)) {
      const AddedToken token = read_token(part);
      bytes += token.content.size();
      if (bytes > kMostBytes) throw tokenizer.unknown("so much text of added tokens");
      const bool is_new = texts_.count(token.id) == 0 && contents.insert(token.content).second;
      if (!is_new) throw part.expected("id", "a token that was not added before");
      check_id(part, token, vocabulary, next);
      next = std::max<std::int64_t>(next, token.id + 1);
      texts_.emplace(token.id, token.normalized ? normalizer(token.content) : token.content);
      if (token.special) special_.insert(token.content);
      if (token.special) special_ids_.insert(token.id);
      tokens.push_back(token);
    }
  }
  // Of tokens with the same text after normalization, special ones count.
  std::stable_sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.special > b.special; });
  for (const AddedToken& token : tokens) {
    if (token.normalized) {
      normalized_.add(texts_.at(token.id), token);
    } else {
      as_written_.add(token.content, token);
    }
  }
}

const std::string* AddedTokens::text(std::int64_t id) const {
  const auto found = texts_.find(id);
  return found == texts_.end() ? nullptr : &found->second;
}

}  // namespace dynexport::text
