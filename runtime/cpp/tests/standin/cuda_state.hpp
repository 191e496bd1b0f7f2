// What the stand-in for the CUDA driver holds: device memory, which is the host's, one queue of work, CUDA graphs.
#pragma once

#include <cuda.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "settings.hpp"

namespace standin {

constexpr std::size_t kAlignment = 256;

using Work = std::function<void()>;
using Works = std::vector<Work>;
using Address = CUdeviceptr;

struct Block {
  std::unique_ptr<char[]> held;
  std::size_t bytes = 0;
};

struct State {
  std::recursive_mutex lock;
  std::map<Address, Block> memory;
  std::map<std::string, int> calls;
  std::size_t used = 0, hosts = 0, streams = 0, graphs = 0, captured = 0;
  Works queue;
  Works* capturing = nullptr;
  bool broken = false, failed = false;

  ~State() {
    report("cuda", {{"used", used},
                    {"host", hosts},
                    {"streams", streams},
                    {"graphs", graphs},
                    {"captured", captured},
                    {"calls", calls}});
  }
};

inline State& state() {
  static State made;
  return made;
}

inline thread_local int contexts = 0;

inline bool inside(Address address, std::size_t bytes) {
  const State& s = state();
  auto block = s.memory.upper_bound(address);
  if (block == s.memory.begin()) return false;
  --block;
  return address - block->first <= block->second.bytes && bytes <= block->second.bytes - (address - block->first);
}

inline CUresult refused(const char* what) {
  std::fprintf(stderr, "stand-in for CUDA: %s\n", what);
  return CUDA_ERROR_ILLEGAL_ADDRESS;
}

inline void enqueue(Work work) {
  State& s = state();
  (s.capturing != nullptr ? *s.capturing : s.queue).push_back(std::move(work));
}

inline void run_queue() {
  Works works;
  works.swap(state().queue);
  for (const Work& work : works) work();
}

inline void move(void* to, const void* from, std::size_t bytes) {
  enqueue([=] { std::memmove(to, from, bytes); });
}

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

// A function that runs for one thread at a time, counted, and fails if a test wants it to.
template <typename Call>
CUresult called(const char* name, bool needs_context, Call call) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> held(s.lock);
  ++s.calls[name];
  const auto errors = settings().find("errors");
  if (errors != settings().end() && errors->contains(name)) return static_cast<CUresult>(errors->at(name).get<int>());
  if (needs_context && contexts == 0) return CUDA_ERROR_INVALID_CONTEXT;
  return call(s);
}

}  // namespace standin
