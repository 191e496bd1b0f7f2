// Saved parts of rows: found by their tokens, dropped by their use.
#include <doctest/doctest.h>

#include <vector>

#include "serving/prefix_store.hpp"

using dynexport::Chunks;
using dynexport::PrefixStore;
using dynexport::Saved;

namespace {

constexpr std::size_t kBytes = 100;
const Chunks kParts{2, false};

Saved part() {
  Saved saved;
  saved.entries["0.key"].resize(kBytes);
  return saved;
}

// Adds the parts of a row of tokens, two a part. Returns the keys.
std::vector<PrefixStore::Key> add(PrefixStore& store, const PrefixStore::Ids& tokens) {
  std::vector<PrefixStore::Key> keys;
  PrefixStore::Key before = PrefixStore::root({0, 1});
  for (std::size_t start = 0; start + 2 <= tokens.size(); start += 2) {
    const PrefixStore::Key key = PrefixStore::key(before, {tokens[start], tokens[start + 1]});
    store.add(before, key, part());
    keys.push_back(key);
    before = key;
  }
  return keys;
}

std::size_t found(PrefixStore& store, const PrefixStore::Ids& tokens) {
  return store.longest(PrefixStore::root({0, 1}), tokens, kParts).size();
}

}  // namespace

TEST_CASE("the longest prefix is found, never with the last token") {
  PrefixStore store(1000);
  add(store, {1, 2, 3, 4, 5, 6});
  CHECK(found(store, {1, 2, 3, 4, 5, 6, 7}) == 3);
  CHECK(found(store, {1, 2, 3, 4, 5, 6}) == 2);
  CHECK(found(store, {1, 2, 3, 4, 9, 9, 9}) == 2);
  CHECK(found(store, {1, 9, 3, 4, 5}) == 0);
  CHECK(store.longest(PrefixStore::root({0}), {1, 2, 3}, kParts).empty());
  CHECK(store.bytes() == 3 * kBytes);
}

TEST_CASE("later parts of the row that was not used for the longest time go first") {
  PrefixStore store(4 * kBytes);
  add(store, {1, 2, 3, 4});
  add(store, {5, 6, 7, 8});
  CHECK(found(store, {1, 2, 3, 4, 0}) == 2);
  add(store, {9, 9});
  CHECK(found(store, {5, 6, 7, 8, 0}) == 1);
  CHECK(found(store, {1, 2, 3, 4, 0}) == 2);
  CHECK(store.bytes() == 4 * kBytes);
}

TEST_CASE("a part that is larger than the memory is not kept, and none twice") {
  PrefixStore small(kBytes - 1);
  add(small, {1, 2});
  CHECK(small.bytes() == 0);
  PrefixStore store(10 * kBytes);
  add(store, {1, 2});
  add(store, {1, 2});
  CHECK(store.bytes() == kBytes);
}

TEST_CASE("a part stays valid for its reader when it goes") {
  PrefixStore store(kBytes);
  add(store, {1, 2});
  const auto kept = store.longest(PrefixStore::root({0, 1}), {1, 2, 3}, kParts);
  add(store, {3, 4});
  CHECK(found(store, {1, 2, 3}) == 0);
  CHECK(kept.at(0).second->bytes() == kBytes);
}
