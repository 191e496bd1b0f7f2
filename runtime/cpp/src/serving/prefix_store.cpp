// Keys by SHA-256, and the order of use.
#include "serving/prefix_store.hpp"

#include "bundle/sha256.hpp"

namespace dynexport {
namespace {

PrefixStore::Key hash(const std::string& before, const std::int64_t* values, std::size_t count) {
  Sha256 sha256;
  sha256.add(before.data(), before.size());
  sha256.add(values, count * sizeof(std::int64_t));
  return sha256.bytes();
}

}  // namespace

PrefixStore::Key PrefixStore::root(const std::vector<std::int64_t>& layers) {
  return hash({}, layers.data(), layers.size());
}

PrefixStore::Key PrefixStore::key(const Key& before, const Ids& tokens) {
  return hash(before, tokens.data(), tokens.size());
}

std::vector<PrefixStore::Part> PrefixStore::longest(const Key& root, const Ids& tokens, const Chunks& parts) {
  std::vector<Part> found;
  Key next = root;
  const auto end = static_cast<std::int64_t>(tokens.size());
  for (std::int64_t start = 0, stop = 0; (stop = start + parts.size(start)) < end; start = stop) {
    next = key(next, {tokens.begin() + start, tokens.begin() + stop});
    const auto part = parts_.find(next);
    if (part == parts_.end()) break;
    found.emplace_back(next, part->second.saved);
  }
  if (!found.empty()) use(found.back().first);
  return found;
}

void PrefixStore::add(const Key& before, const Key& key, Saved saved) {
  const std::size_t bytes = saved.bytes();
  if (has(key) || bytes > limit_) return;
  used_.push_back(key);
  const auto place = std::prev(used_.end());
  parts_.emplace(key, Kept{std::make_shared<const Saved>(std::move(saved)), bytes, before, place});
  bytes_ += bytes;
  use(key);
  while (bytes_ > limit_) {
    const auto oldest = parts_.find(used_.front());
    bytes_ -= oldest->second.bytes;
    parts_.erase(oldest);
    used_.pop_front();
  }
}

void PrefixStore::use(const Key& key) {
  for (auto part = parts_.find(key); part != parts_.end(); part = parts_.find(part->second.before)) {
    used_.splice(used_.end(), used_, part->second.place);
  }
}

}  // namespace dynexport
