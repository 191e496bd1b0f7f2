// The threads of one call, which go through its phases together.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include "context.hpp"
#include "kernels.hpp"

namespace dynexport::cpu {

// A range of rows of activations, which begins with a tile.
struct Rows {
  std::int64_t begin, end;
};

// A member of a team: what it shares is done by the members who are there, however many these are. A member waits only
// for chunks that another one has begun, so a call never waits for a thread that did not come.
class Team {
 public:
  struct alignas(64) Phase {
    std::atomic<std::int64_t> next{0}, done{0};
  };
  static constexpr int kMostPhases = 8;

  // A team of one.
  Team() = default;
  explicit Team(Phase* phases) : phase_(phases) {}

  // Calls of_chunk(0) to of_chunk(chunks - 1), each by one member, and returns when all are done: the next phase.
  template <class Function>
  void share(std::int64_t chunks, const Function& of_chunk) {
    if (phase_ == nullptr) {
      for (std::int64_t i = 0; i < chunks; ++i) of_chunk(i);
      return;
    }
    std::int64_t own = 0;
    for (std::int64_t i; (i = phase_->next.fetch_add(1, std::memory_order_relaxed)) < chunks; ++own) of_chunk(i);
    phase_->done.fetch_add(own, std::memory_order_acq_rel);
    wait(chunks);
    ++phase_;
  }

  // For every tile of some rows, of_tile(first row, rows).
  template <class Function>
  void share_tiles(Rows rows, const Function& of_tile) {
    const std::int64_t tiles = (rows.end - rows.begin + kMostRows - 1) / kMostRows;
    share(tiles, [&](std::int64_t i) {
      const std::int64_t begin = rows.begin + i * kMostRows;
      for_tiles({begin, std::min(rows.end, begin + kMostRows)}, of_tile);
    });
  }

  // For all groups of 16 results of a product and every tile, of_tile(group, first row, rows).
  template <class Function>
  void share_groups(Rows rows, std::int64_t columns, std::int64_t results, const Function& of_tile) {
    constexpr std::int64_t kWorthClaiming = 1 << 16;  // products of numbers
    const std::int64_t groups = (results + kLanes - 1) / kLanes;
    const std::int64_t of_group = columns * kLanes * (rows.end - rows.begin);
    const std::int64_t chunk = std::max({std::int64_t{1}, kWorthClaiming / of_group, groups / (32 * processors())});
    share((groups + chunk - 1) / chunk, [&](std::int64_t i) {
      for (std::int64_t group = i * chunk; group < std::min(groups, (i + 1) * chunk); ++group)
        for_tiles(rows, [&](std::int64_t first, int count) { of_tile(group, first, count); });
    });
  }

  static std::int64_t processors() {
    static const std::int64_t found = std::max(1U, std::thread::hardware_concurrency());
    return found;
  }

 private:
  template <class Function>
  static void for_tiles(Rows rows, const Function& of_tile) {
    for (std::int64_t first = rows.begin; first < rows.end;) {
      const int count = next_tile(rows.end - first);
      of_tile(first, count);
      first += count;
    }
  }

  void wait(std::int64_t chunks) const {
    constexpr int kPatience = 4096;
    for (int i = 0; phase_->done.load(std::memory_order_acquire) < chunks; ++i) {
      if (i < kPatience)
        relax();
      else
        std::this_thread::yield();
    }
  }
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Phase* phase_ = nullptr;
};

// Calls work(team, rows) until all rows are done. Threads share the phases of few rows; of many, each takes some rows
// through all phases, so that these rows stay in its cache.
template <class Function>
void by_rows(const Ort::KernelContext& context, std::int64_t rows, std::int64_t operations, const Function& work) {
  constexpr std::int64_t kRowsOfPart = 32, kPartsOfThread = 4;
  if (operations < kWorthThreads) {
    Team alone;
    work(alone, Rows{0, rows});
    return;
  }
  const std::int64_t parts = (rows + kRowsOfPart - 1) / kRowsOfPart;
  Team::Phase phases[Team::kMostPhases];
  for_each(context, Team::processors(), operations, [&](std::int64_t) {
    Team team(phases);
    if (parts < kPartsOfThread * Team::processors()) {
      work(team, Rows{0, rows});
      return;
    }
    team.share(parts, [&](std::int64_t part) {
      Team alone;
      work(alone, Rows{part * kRowsOfPart, std::min(rows, (part + 1) * kRowsOfPart)});
    });
  });
}

}  // namespace dynexport::cpu
