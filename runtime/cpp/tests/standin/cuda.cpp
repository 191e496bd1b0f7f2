// A stand-in for the CUDA driver: device memory is the host's. It is as strict as a driver, where that is known:
// nothing in a stream happens before somebody waits; memory is checked for bounds and for use after it was freed; calls
// need a current context; a CUDA graph repeats what was captured.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "settings.hpp"

namespace {

enum Code { kGood = 0, kInvalid = 1, kNoMemory = 2, kNoContext = 201, kNotReady = 600, kIllegal = 700, kNotCapturable = 900 };
constexpr std::size_t kAlignment = 256;

using Work = std::function<void()>;
using Works = std::vector<Work>;
using Address = std::uint64_t;

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
    standin::report("cuda", {{"used", used}, {"host", hosts}, {"streams", streams}, {"graphs", graphs},
                             {"captured", captured}, {"calls", calls}});
  }
};

State& state() {
  static State made;
  return made;
}

thread_local int contexts = 0;

bool inside(Address address, std::size_t bytes) {
  const State& s = state();
  auto block = s.memory.upper_bound(address);
  if (block == s.memory.begin()) return false;
  --block;
  return address - block->first <= block->second.bytes && bytes <= block->second.bytes - (address - block->first);
}

int refused(const char* what) {
  std::fprintf(stderr, "stand-in for CUDA: %s\n", what);
  return kIllegal;
}

void enqueue(Work work) {
  State& s = state();
  (s.capturing != nullptr ? *s.capturing : s.queue).push_back(std::move(work));
}

void run_queue() {
  Works works;
  works.swap(state().queue);
  for (const Work& work : works) work();
}

void move(void* to, const void* from, std::size_t bytes) {
  enqueue([=] { std::memmove(to, from, bytes); });
}

void* at(Address address) { return reinterpret_cast<void*>(address); }

// A function that runs for one thread at a time, counted, and fails if a test wants it to.
template <typename Call>
int called(const char* name, bool needs_context, Call call) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> held(s.lock);
  ++s.calls[name];
  const auto errors = standin::settings().find("errors");
  if (errors != standin::settings().end() && errors->contains(name)) return errors->at(name).get<int>();
  if (needs_context && contexts == 0) return kNoContext;
  return call(s);
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  return called("cuInit", false, [](State&) { return kGood; });
}

int cuGetErrorString(int code, const char** text) {
  static const std::map<int, const char*> texts = {{kInvalid, "invalid argument"},
                                                   {kNoMemory, "out of memory"},
                                                   {kNoContext, "invalid device context"},
                                                   {kIllegal, "an illegal memory access was encountered"},
                                                   {kNotCapturable, "operation not permitted when stream is capturing"}};
  const auto found = texts.find(code);
  *text = found == texts.end() ? "unknown error" : found->second;
  return kGood;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kGood;
}

int cuDeviceGetCount(int* count) {
  *count = standin::setting("devices", 1);
  return kGood;
}

int cuDeviceGet(int* device, int index) {
  *device = index;
  return kGood;
}

int cuDeviceGetName(char* name, int size, int) {
  std::snprintf(name, static_cast<std::size_t>(size), "%s", standin::setting("gpu", std::string("Ada card")).c_str());
  return kGood;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? standin::setting("major", 8) : standin::setting("minor", 9);
  return kGood;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &state();
  return kGood;
}

int cuDevicePrimaryCtxRelease_v2(int) { return kGood; }

int cuCtxPushCurrent_v2(void* context) {
  return called("cuCtxPushCurrent", false, [&](State& s) {
    if (context != &s) return kInvalid;
    ++contexts;
    return kGood;
  });
}

int cuCtxPopCurrent_v2(void** context) {
  return called("cuCtxPopCurrent", true, [&](State& s) {
    --contexts;
    *context = &s;
    return kGood;
  });
}

int cuMemAlloc_v2(Address* address, std::size_t bytes) {
  return called("cuMemAlloc", true, [&](State& s) {
    if (s.capturing != nullptr) {
      s.broken = true;
      return kNotCapturable;
    }
    if (bytes == 0) return kInvalid;
    if (s.used + bytes > standin::setting("memory", std::uint64_t{1} << 40)) return kNoMemory;
    Block block{std::make_unique<char[]>(bytes + kAlignment), bytes};
    std::memset(block.held.get(), 0xff, bytes + kAlignment);
    *address = (reinterpret_cast<Address>(block.held.get()) + kAlignment - 1) / kAlignment * kAlignment;
    s.used += bytes;
    s.memory.emplace(*address, std::move(block));
    return kGood;
  });
}

int cuMemFree_v2(Address address) {
  return called("cuMemFree", true, [&](State& s) {
    run_queue();
    const auto block = s.memory.find(address);
    if (block == s.memory.end()) return kInvalid;
    s.used -= block->second.bytes;
    s.memory.erase(block);
    return kGood;
  });
}

int cuMemAllocHost_v2(void** host, std::size_t bytes) {
  return called("cuMemAllocHost", true, [&](State& s) {
    *host = std::malloc(bytes);
    s.hosts += 1;
    return *host == nullptr ? kNoMemory : kGood;
  });
}

int cuMemFreeHost(void* host) {
  return called("cuMemFreeHost", true, [&](State& s) {
    run_queue();
    s.hosts -= 1;
    std::free(host);
    return kGood;
  });
}

int cuMemsetD8Async(Address address, unsigned char value, std::size_t bytes, void*) {
  return called("cuMemsetD8Async", true, [&](State&) {
    if (!inside(address, bytes)) return refused("cuMemsetD8Async outside of the device's memory");
    enqueue([=] { std::memset(at(address), value, bytes); });
    return static_cast<int>(kGood);
  });
}

int cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, void*) {
  return called("cuMemcpyHtoDAsync", true, [&](State&) {
    if (!inside(to, bytes)) return refused("cuMemcpyHtoDAsync outside of the device's memory");
    move(at(to), from, bytes);
    return static_cast<int>(kGood);
  });
}

int cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, void*) {
  return called("cuMemcpyDtoHAsync", true, [&](State&) {
    if (!inside(from, bytes)) return refused("cuMemcpyDtoHAsync outside of the device's memory");
    move(to, at(from), bytes);
    return static_cast<int>(kGood);
  });
}

int cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, void*) {
  return called("cuMemcpyDtoDAsync", true, [&](State&) {
    if (!inside(to, bytes) || !inside(from, bytes)) return refused("cuMemcpyDtoDAsync outside of the device's memory");
    move(at(to), at(from), bytes);
    return static_cast<int>(kGood);
  });
}

struct Copy2d {
  std::size_t source_x, source_y;
  int source_kind;
  const void* source_host;
  Address source_device;
  void* source_array;
  std::size_t source_pitch;
  std::size_t x, y;
  int kind;
  void* host;
  Address device;
  void* array;
  std::size_t pitch;
  std::size_t width, height;
};

int cuMemcpy2DUnaligned_v2(const Copy2d* copy) {
  return called("cuMemcpy2DUnaligned", true, [&](State& s) {
    constexpr int kHost = 1;
    if (!s.queue.empty()) return static_cast<int>(kNotReady);  // it is not in the stream, and would not wait for it
    if (copy->width > copy->pitch || copy->width > copy->source_pitch || copy->height == 0) {
      return static_cast<int>(kInvalid);
    }
    for (std::size_t line = 0; line < copy->height; ++line) {
      const Address from = copy->source_device + line * copy->source_pitch, to = copy->device + line * copy->pitch;
      if ((copy->source_kind != kHost && !inside(from, copy->width)) || (copy->kind != kHost && !inside(to, copy->width))) {
        return refused("cuMemcpy2DUnaligned outside of the device's memory");
      }
      const void* source = copy->source_kind == kHost
                               ? static_cast<const char*>(copy->source_host) + line * copy->source_pitch
                               : at(from);
      std::memmove(copy->kind == kHost ? static_cast<char*>(copy->host) + line * copy->pitch : at(to), source, copy->width);
    }
    return static_cast<int>(kGood);
  });
}

int cuStreamCreate(void** stream, unsigned) {
  return called("cuStreamCreate", true, [&](State& s) {
    *stream = &s.queue;
    s.streams += 1;
    return kGood;
  });
}

int cuStreamDestroy_v2(void*) {
  return called("cuStreamDestroy", true, [](State& s) {
    s.streams -= 1;
    return kGood;
  });
}

int cuStreamSynchronize(void*) {
  return called("cuStreamSynchronize", true, [](State& s) {
    if (s.capturing != nullptr) {
      s.broken = true;
      return static_cast<int>(kNotCapturable);
    }
    run_queue();
    return s.failed ? refused("work in the stream failed") : static_cast<int>(kGood);
  });
}

int cuStreamBeginCapture_v2(void*, int) {
  return called("cuStreamBeginCapture", true, [](State& s) {
    if (s.capturing != nullptr || !s.queue.empty()) return kNotCapturable;
    s.capturing = new Works;
    s.broken = false;
    return kGood;
  });
}

int cuStreamEndCapture(void*, void** graph) {
  return called("cuStreamEndCapture", true, [&](State& s) {
    std::unique_ptr<Works> works(s.capturing);
    s.capturing = nullptr;
    *graph = nullptr;
    if (s.broken || works == nullptr) return kNotCapturable;
    s.captured += 1;
    *graph = works.release();
    return kGood;
  });
}

int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  return called("cuGraphInstantiate", true, [&](State& s) {
    *executable = new Works(*static_cast<Works*>(graph));
    s.graphs += 1;
    return kGood;
  });
}

int cuGraphLaunch(void* executable, void*) {
  return called("cuGraphLaunch", true, [&](State&) {
    for (const Work& work : *static_cast<Works*>(executable)) enqueue(work);
    return kGood;
  });
}

int cuGraphDestroy(void* graph) {
  return called("cuGraphDestroy", true, [&](State& s) {
    delete static_cast<Works*>(graph);
    s.captured -= 1;
    return kGood;
  });
}

int cuGraphExecDestroy(void* executable) {
  return called("cuGraphExecDestroy", true, [&](State& s) {
    delete static_cast<Works*>(executable);
    s.graphs -= 1;
    return kGood;
  });
}

int cuLaunchHostFunc(void*, void (*function)(void*), void* data) {
  return called("cuLaunchHostFunc", true, [&](State&) {
    enqueue([=] { function(data); });
    return kGood;
  });
}

// For the stand-in for TensorRT: whether memory is the device's, and that a kernel failed.
int standin_inside(const void* address, std::size_t bytes) {
  const std::lock_guard<std::recursive_mutex> held(state().lock);
  return inside(reinterpret_cast<Address>(address), bytes) ? 1 : 0;
}

void standin_fail() { state().failed = true; }
}
