// The interfaces of engines: an Engine runs one graph, a Backend opens the engines of a bundle.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/bundle.hpp"

namespace dynexport {

// A view of an array in memory, row-major.
struct Tensor {
  Type type = Type::kFloat;
  std::vector<std::int64_t> shape;
  void* data = nullptr;

  std::int64_t elements() const;
  std::size_t bytes() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Zeroed memory of the caches' kind: the host's, or the device's. Large host memory commits only pages that are
// written.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* data() = 0;
};

// A buffer of a cache, [rows, ..].
struct Buffer {
  Type type = Type::kFloat;
  std::vector<std::int64_t> shape;
  std::shared_ptr<Memory> memory;
};

// The buffers of all caches, by "{place}.{part}". Buffers that have grown are a new object with another ``version``.
struct Buffers {
  std::map<std::string, Buffer> by_name;
  std::uint64_t version = 0;  // unique in the process
};

// The KV caches that one call reads and writes in place.
struct Caches {
  std::shared_ptr<const Buffers> buffers;
  std::int64_t first = 0, rows = 0;   // the neighbouring rows that the call is for
  std::optional<std::int64_t> place;  // for a graph that works on one cache per call
};

// A call with bound inputs, results and caches, to be run many times by one thread.
class Binding {
 public:
  virtual ~Binding() = default;
  // Host memory of an input or a result (except caches); write inputs before run, read results after it.
  // A result's memory is overwritten by the next run. Throws Error for an unknown name.
  virtual Tensor input(const std::string& name) = 0;
  virtual Tensor result(const std::string& name) = 0;
  virtual bool has_result(const std::string& name) const = 0;
  // Throws Error when the engine fails.
  virtual void run() = 0;
};

using Shapes = std::map<std::string, std::vector<std::int64_t>>;

// A loaded graph. Threads may run different bindings of it at once, on caches of their own.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual const Graph& graph() const = 0;
  // Binds memory for inputs of these shapes (all inputs except caches), the results that follow from them, and caches.
  virtual std::unique_ptr<Binding> bind(const Shapes& inputs, const Caches& caches) = 0;
};

// The engine library for a bundle; it opens engines and allocates the memory that they share.
class Backend {
 public:
  virtual ~Backend() = default;
  // Whether caches may be moved to larger buffers while they are in use.
  virtual bool grows() const = 0;
  virtual std::unique_ptr<Engine> open(const Graph& graph) = 0;
  virtual std::shared_ptr<Memory> allocate(std::size_t bytes) = 0;
  // Copies entries first..first+count-1 of a row of ``from`` to a row of ``to``, at the same places; buffers are
  // [rows, heads, slots, size] or [rows, slots], with possibly different numbers of slots.
  virtual void copy_entries(const Buffer& from, std::int64_t row, const Buffer& to, std::int64_t target,
                            std::int64_t first, std::int64_t count) = 0;
  // Copies entries of a row to host memory [heads, count, size] or [count], and back.
  virtual void read_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                            void* host) = 0;
  virtual void write_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                             const void* host) = 0;
};

struct BackendOptions {
  std::string kind = "onnxruntime";  // "onnxruntime", "onnxruntime-cuda", "tensorrt" or "tensorrt-rtx"
  int threads = 0;                   // intra-op threads; 0 lets the engine choose
  std::string weights = "packed";    // or "mapped": fp32 weights as they lie in the file, shared by processes
  std::string library;               // path of the engine's shared library; empty: looked for by its usual name
  // Path of the library of dynexport's operators: its TensorRT plugins, or for ONNX Runtime on the CPU its CPU operators.
  // These are also looked for at DYNEXPORT_CPU_OPERATORS and beside this library; without them, their bodies run.
  std::string plugins;
  bool trust_engines = false;        // whether TensorRT may load engines that were not built on this machine
};

// Opens the backend of a bundle. Throws Error when the bundle cannot run on it, or its library is missing or of a
// version that does not fit.
std::shared_ptr<Backend> open_backend(std::shared_ptr<const Bundle> bundle, const BackendOptions& options);

}  // namespace dynexport
