// The threads of one call, which go through its phases together.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include "context.hpp"
#include "kernels.hpp"

namespace dynexport::cpu {

inline std::int64_t processors() {
  static const std::int64_t found = std::max(1U, std::thread::hardware_concurrency());
  return found;
}

// What the members of a team know of each other.
class Phases {
 public:
  static constexpr int kMostPhases = 6, kMostShares = 16;

  Phases() : shares_(static_cast<int>(std::min<std::int64_t>(processors(), kMostShares))) {}
  int shares() const { return shares_; }
  int next_share() { return arrived_.fetch_add(1, std::memory_order_relaxed) % shares_; }
  // Counts the chunks that were begun of a share, and those that were done of all.
  std::atomic<std::int64_t>& begun(int phase, int share) { return phases_[phase].shares[share].begun; }
  std::atomic<std::int64_t>& done(int phase) { return phases_[phase].done; }

 private:
  struct alignas(64) Share {
    std::atomic<std::int64_t> begun{0};
  };
  struct Phase {
    Share shares[kMostShares];
    alignas(64) std::atomic<std::int64_t> done{0};
  };

  int shares_;
  std::atomic<int> arrived_{0};
  Phase phases_[kMostPhases];
};

// A member of a team: each begins with chunks of its own share, neighbours in memory, and then takes those that others
// have left. A member waits only for chunks that another one has begun, never for a thread that has not come.
class Team {
 public:
  // A team of one.
  Team() = default;
  explicit Team(Phases* phases) : phases_(phases), share_(phases->next_share()) {}

  // Calls of_chunk(0) to of_chunk(chunks - 1), each by one member, after all of the phase before.
  template <class Function>
  void share(std::int64_t chunks, const Function& of_chunk) {
    if (phases_ == nullptr) {
      for (std::int64_t i = 0; i < chunks; ++i) of_chunk(i);
      return;
    }
    wait();
    const int shares = phases_->shares();
    std::int64_t own = 0;
    for (int turn = 0; turn < shares; ++turn) {
      const std::int64_t share = (share_ + turn) % shares;
      const std::int64_t begin = share * chunks / shares, end = (share + 1) * chunks / shares;
      auto& begun = phases_->begun(phase_, static_cast<int>(share));
      for (std::int64_t i; (i = begin + begun.fetch_add(1, std::memory_order_relaxed)) < end; ++own) of_chunk(i);
    }
    phases_->done(phase_).fetch_add(own, std::memory_order_acq_rel);
    ++phase_;
    chunks_before_ = chunks;
  }

  // For every tile of some rows, of_tile(first row, rows).
  template <class Function>
  void share_tiles(std::int64_t rows, const Function& of_tile) {
    share((rows + kMostRows - 1) / kMostRows,
          [&](std::int64_t i) { for_tiles(i * kMostRows, std::min(rows, (i + 1) * kMostRows), of_tile); });
  }

  // For all groups of 16 results of a product and every tile, of_tile(group, first row, rows).
  template <class Function>
  void share_groups(std::int64_t rows, std::int64_t columns, std::int64_t results, const Function& of_tile) {
    constexpr std::int64_t kWorthClaiming = 1 << 15;  // products of numbers
    constexpr std::int64_t kMostTurns = 16;
    const std::int64_t groups = (results + kLanes - 1) / kLanes, all = groups * columns * kLanes * rows;
    const std::int64_t turns = std::clamp(all / (kWorthClaiming * processors()), std::int64_t{1}, kMostTurns);
    const std::int64_t chunks = std::min(groups, turns * processors());
    share(chunks, [&](std::int64_t i) {
      for (std::int64_t group = i * groups / chunks; group < (i + 1) * groups / chunks; ++group)
        for_tiles(0, rows, [&](std::int64_t first, int count) { of_tile(group, first, count); });
    });
  }

 private:
  template <class Function>
  static void for_tiles(std::int64_t begin, std::int64_t end, const Function& of_tile) {
    for (std::int64_t first = begin; first < end;) {
      const int count = next_tile(end - first);
      of_tile(first, count);
      first += count;
    }
  }

  // Until the phase before is done.
  void wait() const {
    constexpr int kPatience = 1000;
    if (phase_ == 0) return;
    const auto& done = phases_->done(phase_ - 1);
    for (int i = 0; done.load(std::memory_order_acquire) < chunks_before_; ++i) {
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

  Phases* phases_ = nullptr;
  int share_ = 0, phase_ = 0;
  std::int64_t chunks_before_ = 0;
};

// Rows that go through the phases of a call together: their activations stay in the cache of a core.
constexpr std::int64_t kMostTogether = 256;

// Calls work(team, first row, rows) in all threads, for one part of the rows after the other.
template <class Function>
void by_parts(const Ort::KernelContext& context, std::int64_t rows, std::int64_t operations_of_row,
              const Function& work) {
  for (std::int64_t first = 0; first < rows; first += kMostTogether) {
    const std::int64_t count = std::min(kMostTogether, rows - first);
    if (count * operations_of_row < kWorthThreads) {
      Team alone;
      work(alone, first, count);
      continue;
    }
    Phases phases;
    for_each(context, processors(), count * operations_of_row, [&](std::int64_t) {
      Team team(&phases);
      work(team, first, count);
    });
  }
}

}  // namespace dynexport::cpu
