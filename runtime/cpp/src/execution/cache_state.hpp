// The parts of a KvCache, for the executor and the streams that use it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "dynexport/kv_cache.hpp"
#include "execution/bindings.hpp"
#include "execution/cache_memory.hpp"
#include "execution/claim.hpp"
#include "execution/counts.hpp"
#include "execution/plain_step.hpp"
#include "execution/texts.hpp"

namespace dynexport {

struct KvCache::State {
  State(std::shared_ptr<const Bundle> bundle, std::shared_ptr<Backend> backend, std::int64_t rows, std::int64_t tokens,
        bool record, std::optional<std::int64_t> room);

  const Manifest& manifest() const { return bundle->manifest(); }
  bool is_free(std::int64_t row) const { return free[static_cast<std::size_t>(row)]; }
  // Throws Error unless a row is acquired.
  void check(std::int64_t row) const;
  // Throws Error when a row has no room for some more tokens.
  void check_room(std::int64_t row, std::int64_t count, bool is_prompt) const;
  // Throws Error when there are more entries than slots of a row of a place.
  void check_entries(std::int64_t place, std::int64_t entries) const;
  // The slots behind a row's entries that a call may write without growing the buffers.
  std::int64_t room(std::int64_t row) const;
  // Grows the buffers to hold some tokens per row, or the capacity if that is less.
  void reserve(std::int64_t count);
  // The caches of some rows, for a call.
  Caches caches(std::int64_t first, std::int64_t count, std::optional<std::int64_t> place = std::nullopt) const;
  // A mark at the end of a row.
  Mark mark(std::int64_t row) const;
  // Sets a row's counts and its log to those of a mark.
  void restore(const Mark& mark);
  // Adds what a call wrote: tokens [B] and entries [places, B] of the rows from ``first`` on; decisions are one per
  // row, or none.
  void commit(std::int64_t first, const std::vector<std::int64_t>& counted, const std::vector<std::int64_t>& entries,
              const std::vector<Decisions>& decisions);

  std::shared_ptr<const Bundle> bundle;
  std::shared_ptr<Backend> backend;
  std::int64_t rows, tokens;
  CacheMemory memory;
  Counts counts;
  std::optional<std::vector<std::vector<Decisions>>> logs;  // per row the decisions of every call
  Texts texts;
  std::vector<bool> free;
  Claim streamed{"cache: expected one that no other stream uses, found it in use; close that stream"};
  Claim running{"cache: expected one that no other thread uses, found a step of another thread running"};
  Bindings bindings;
  LatestStep step;
  std::vector<float> logits;  // of the latest decode step, where they are not in an engine's memory
};

// Restores the rows' counts unless it is told to keep them, so that a failed batch has no effect.
class AsItWas {
 public:
  AsItWas(KvCache::State& cache, const std::vector<std::int64_t>& rows);
  ~AsItWas();
  AsItWas(const AsItWas&) = delete;
  AsItWas& operator=(const AsItWas&) = delete;
  void keep() { before_.clear(); }

 private:
  KvCache::State& cache_;
  std::vector<Mark> before_;
};

}  // namespace dynexport
