// Byte pair encoding, as the tokenizers library does it.
#include "text/bpe.hpp"

#include <functional>
#include <queue>
#include <string_view>
#include <utility>

#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr std::size_t kMostMerges = 1 << 23;
constexpr std::size_t kLongestCached = 256, kCachedPerShard = 2048;

std::uint64_t key(TokenId left, TokenId right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
}

Vocabulary read_vocabulary(const Fields& description) {
  const auto& vocab = description.object("vocab");
  std::vector<std::optional<std::string>> texts;
  texts.reserve(vocab.size());
  for (const auto& [token, id] : vocab.items()) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= static_cast<std::uint64_t>(kMostTokens)) {
      throw Error(description.where() + ": vocab: " + shown(token) + ": expected an id below " +
                  std::to_string(kMostTokens));
    }
    const auto place = id.get<std::size_t>();
    if (place >= texts.size()) texts.resize(place + 1);
    if (texts[place]) throw Error(description.where() + ": vocab: two tokens have the id " + std::to_string(place));
    texts[place] = token;
  }
  return Vocabulary(std::move(texts));
}

std::string byte_name(unsigned byte) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  return std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15U] + ">";
}

// A list of symbols, from which merged ones are taken out.
struct Symbol {
  TokenId id = 0;
  std::int32_t previous = -1, next = -1;
  bool gone = false;
};

// A pair that may be merged; the lowest rank goes first, then the leftmost pair.
struct Candidate {
  std::uint32_t rank = 0;
  std::int32_t left = 0;
  TokenId id = 0;

  bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
};

}  // namespace

Bpe::Bpe(const Fields& description) : vocabulary_(read_vocabulary(description)) {
  description.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                    "byte_fallback", "ignore_merges", "vocab", "merges"});
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (description.has(name) && !description.text(name).empty()) throw description.unknown(name);
  }
  if (description.has("dropout")) throw description.unknown("dropout");
  whole_words_ = description.flag("ignore_merges", false);
  fuse_unknown_ = description.flag("fuse_unk", false);
  if (description.flag("byte_fallback", false)) {
    for (unsigned byte = 0; byte < 256; ++byte) bytes_.at(byte) = vocabulary_.find(byte_name(byte));
  }
  if (description.has("unk_token")) {
    unknown_ = vocabulary_.find(description.text("unk_token"));
    if (!unknown_) throw description.expected("unk_token", "a token of vocab");
  }
  read_merges(description);
}

void Bpe::read_merges(const Fields& description) {
  const auto& list = description.list("merges", kMostMerges);
  const std::string where = description.where() + ": merges";
  merges_.reserve(list.size());
  for (const auto& merge : list) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      add_merge(merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>(), where);
      continue;
    }
    const std::string both = merge.is_string() ? merge.get<std::string>() : "";
    const std::size_t cut = both.find(' ');
    if (cut == std::string::npos || both.find(' ', cut + 1) != std::string::npos) {
      throw Error(where + ": expected pairs of tokens, found " + shown(both));
    }
    add_merge(both.substr(0, cut), both.substr(cut + 1), where);
  }
}

void Bpe::add_merge(const std::string& left, const std::string& right, const std::string& where) {
  const auto one = vocabulary_.find(left), two = vocabulary_.find(right), both = vocabulary_.find(left + right);
  if (!one || !two || !both) {
    throw Error(where + ": expected tokens of vocab, found " + shown(left) + " and " + shown(right));
  }
  const auto rank = static_cast<std::uint32_t>(merges_.size());
  merges_.insert_or_assign(key(*one, *two), Merge{rank, *both});
}

const Bpe::Merge* Bpe::merge(TokenId left, TokenId right) const {
  const auto found = merges_.find(key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(const std::string& word, std::vector<TokenId>& ids) const {
  const auto append_all = [&](const std::vector<TokenId>& found) { ids.insert(ids.end(), found.begin(), found.end()); };
  Shard& shard = cache_.at(std::hash<std::string_view>()(word) % kShards);
  if (word.size() <= kLongestCached) {
    const std::lock_guard guard(shard.lock);
    if (const auto known = shard.words.find(word); known != shard.words.end()) return append_all(known->second);
  }
  const auto whole = whole_words_ ? vocabulary_.find(word) : std::nullopt;
  std::vector<TokenId> found = whole ? std::vector<TokenId>{*whole} : merged(symbols_of(word));
  append_all(found);
  if (word.size() <= kLongestCached) {
    const std::lock_guard guard(shard.lock);
    if (shard.words.size() < kCachedPerShard) shard.words.emplace(word, std::move(found));
  }
}

// The tokens of single characters. A token for unknown characters is added when a known one follows it, so bytes that
// follow it come before it; the tokenizers library does that.
std::vector<TokenId> Bpe::symbols_of(const std::string& word) const {
  std::vector<TokenId> ids;
  ids.reserve(word.size());
  bool pending = false;
  for (std::size_t at = 0, length; at < word.size(); at += length) {
    length = length_at(word, at);
    const std::string_view letter = std::string_view(word).substr(at, length);
    if (const auto known = vocabulary_.find(letter)) {
      if (pending) ids.push_back(*unknown_);
      pending = false;
      ids.push_back(*known);
      continue;
    }
    bool all = true;
    for (const char byte : letter) all = all && bytes_[static_cast<unsigned char>(byte)].has_value();
    if (all) {
      for (const char byte : letter) ids.push_back(*bytes_[static_cast<unsigned char>(byte)]);
    } else if (unknown_) {
      if (pending && !fuse_unknown_) ids.push_back(*unknown_);
      pending = true;
    }
  }
  if (pending) ids.push_back(*unknown_);
  return ids;
}

std::vector<TokenId> Bpe::merged(const std::vector<TokenId>& ids) const {
  if (ids.size() < 2) return ids;
  std::vector<Symbol> symbols(ids.size());
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](std::int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const Merge* found = merge(symbols[left].id, symbols[symbols[left].next].id);
    if (found != nullptr) queue.push({found->rank, left, found->id});
  };
  const auto count = static_cast<std::int32_t>(ids.size());
  for (std::int32_t i = 0; i < count; ++i) symbols[i] = {ids[i], i - 1, i + 1 < count ? i + 1 : -1, false};
  for (std::int32_t i = 0; i + 1 < count; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.left];
    if (left.gone || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // Stale if the pair there now makes another token. A pair that makes the same one counts, as in the library.
    const Merge* now = merge(left.id, right.id);
    if (now == nullptr || now->id != best.id) continue;
    left.id = best.id;
    left.next = right.next;
    right.gone = true;
    if (right.next >= 0) symbols[right.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  std::vector<TokenId> out;
  for (std::int32_t at = 0; at >= 0; at = symbols[at].next) out.push_back(symbols[at].id);
  return out;
}

std::unique_ptr<const Model> read_model(const Fields& description) {
  const std::string type = description.has("type") ? description.text("type") : "BPE";
  if (type == "BPE") return std::make_unique<Bpe>(description);
  throw description.unknown("the model " + shown(type));
}

}  // namespace dynexport::text
