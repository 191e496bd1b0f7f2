// Keys by SHA-256, and the order of use.
#include "serving/prefix_store.hpp"

#include <openssl/evp.h>

#include <array>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

PrefixStore::Key hash(const std::string& before, const std::int64_t* values, std::size_t count) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  std::array<unsigned char, 32> digest{};
  const bool good = context != nullptr && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1 &&
                    EVP_DigestUpdate(context.get(), before.data(), before.size()) == 1 &&
                    EVP_DigestUpdate(context.get(), values, count * sizeof(std::int64_t)) == 1 &&
                    EVP_DigestFinal_ex(context.get(), digest.data(), nullptr) == 1;
  if (!good) throw Error("prefix: the library of hashes cannot compute SHA-256");
  return {digest.begin(), digest.end()};
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
