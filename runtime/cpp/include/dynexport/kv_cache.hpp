// The KV caches of a batch's rows, and the only writer of their lengths.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "dynexport/engine.hpp"

namespace dynexport {

// The routers' decisions for one row's tokens; arrays are row-major.
struct Decisions {
  std::int64_t rows = 0;  // R, decisions per token: routed layers or hops
  std::int64_t tokens = 0;
  std::vector<std::uint8_t> ran;       // [layers, tokens]
  std::vector<std::int64_t> choices;   // [R, tokens]; layers: 1 run, 0 skip; paths: the layer, the number of layers
                                       // for an exit, -1 after it, -2 where the layer had no room
  std::vector<float> scores, margins;  // [R, tokens]
  std::vector<std::int64_t> overflow;  // [R] or [1]: tokens that found a cache or a layer full
};

// A point in a row that the row can be truncated to.
struct Mark {
  std::int64_t row = 0, position = 0;
  std::uint64_t tenant = 0, made = 0;
  std::vector<std::int64_t> lengths, overflow;
  std::size_t steps = 0;
};

// Entries of consecutive tokens of a row, copied out of its cache.
struct Saved {
  std::map<std::string, std::vector<std::uint8_t>> entries;
  std::vector<std::int64_t> lengths, added;
  std::int64_t first = 0, last = 0;

  std::size_t bytes() const;
};

// KV caches with a fixed number of rows and a largest number of tokens per row. One thread at a time.
class KvCache {
 public:
  KvCache(std::shared_ptr<const Bundle> bundle, std::shared_ptr<Backend> backend, std::int64_t rows,
          std::int64_t tokens, bool record = false, std::optional<std::int64_t> room = std::nullopt);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  std::int64_t rows() const;
  std::int64_t tokens() const;
  // Entries in use, tokens seen, tokens that found a layer full.
  std::int64_t length(std::int64_t place, std::int64_t row) const;
  std::int64_t position(std::int64_t row) const;
  std::int64_t overflow(std::int64_t counter, std::int64_t row) const;
  std::vector<std::int64_t> lengths(std::int64_t row) const;
  // The decisions of every call of a row; empty unless they are recorded.
  const std::vector<Decisions>& log(std::int64_t row) const;
  bool records() const;

  std::vector<std::int64_t> free_rows() const;  // ascending
  std::vector<std::int64_t> acquire(std::int64_t count = 1);
  void release(std::int64_t row);
  void rewind(std::int64_t row);
  Mark mark(std::int64_t row) const;
  void truncate(std::int64_t row, const Mark& mark);
  void copy_prefix(const Mark& mark, std::int64_t target);
  Saved save(std::int64_t row, const std::vector<std::int64_t>& lengths, std::int64_t position) const;
  void restore(std::int64_t row, const Saved& saved);
  void move(std::int64_t row, std::int64_t target);

  struct State;
  State& state();  // for the executor

 private:
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
