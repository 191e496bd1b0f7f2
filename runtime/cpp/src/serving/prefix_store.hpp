// Entries of prompts that have run, kept for later prompts that begin with the same tokens.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dynexport/executor.hpp"
#include "dynexport/kv_cache.hpp"

namespace dynexport {

// Saved parts of rows, each found by the tokens of its row up to its end and the layers that they ran in.
//
// A key is the SHA-256 of the key before it and the part's tokens. When the memory is full, the part that was not used
// for the longest time goes; of one row the later parts go first.
class PrefixStore {
 public:
  using Key = std::string;  // 32 bytes
  using Ids = std::vector<std::int64_t>;
  using Part = std::pair<Key, std::shared_ptr<const Saved>>;

  // ``limit``: memory for all parts, in bytes.
  explicit PrefixStore(std::size_t limit) : limit_(limit) {}

  std::size_t bytes() const { return bytes_; }

  // The first key of rows whose tokens run in these layers.
  static Key root(const std::vector<std::int64_t>& layers);
  // The key of a part's tokens, which follow the part of another key.
  static Key key(const Key& before, const Ids& tokens);

  // Returns the keys and parts of the longest saved prefix of a prompt, and marks them as used. The prompt's last token
  // is never part of it: its logits are needed.
  std::vector<Part> longest(const Key& root, const Ids& tokens, const Chunks& parts);
  bool has(const Key& key) const { return parts_.count(key) != 0; }
  // Keeps a part that follows another one, or the root; one larger than the memory is not kept.
  void add(const Key& before, const Key& key, Saved saved);

 private:
  struct Kept {
    std::shared_ptr<const Saved> saved;
    std::size_t bytes;
    Key before;
    std::list<Key>::iterator place;  // in used_
  };

  // Marks a part and those before it as used, the first one last: the others cannot be found without it.
  void use(const Key& key);

  std::size_t limit_, bytes_ = 0;
  std::unordered_map<Key, Kept> parts_;
  std::list<Key> used_;  // the least recently used first
};

}  // namespace dynexport
