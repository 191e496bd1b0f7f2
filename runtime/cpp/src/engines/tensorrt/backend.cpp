// The engines of a bundle on one GPU; all are chosen, and their records checked, at the start.
#include <functional>
#include <map>
#include <numeric>
#include <utility>

#include "bundle/plain_file.hpp"
#include "dynexport/error.hpp"
#include "engines/tensorrt.hpp"
#include "engines/tensorrt/check.hpp"
#include "engines/tensorrt/device.hpp"
#include "engines/tensorrt/library.hpp"
#include "engines/tensorrt/session.hpp"

namespace dynexport {

namespace tensorrt {

namespace {

// Where entries of a row lie in a buffer [rows, heads, slots, size] or [rows, slots]: ``lines`` runs of neighbouring
// entries, ``pitch`` bytes apart.
struct Entries {
  DevicePointer start = 0;
  std::size_t lines = 0, pitch = 0, entry = 0;
};

Entries entries_of(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count) {
  const std::vector<std::int64_t>& shape = buffer.shape;
  const std::size_t slots = shape.size() == 4 ? 2 : shape.size() - 1;
  if (shape.size() < 2 || row < 0 || row >= shape[0] || first < 0 || count < 0 || first > shape[slots] - count) {
    throw Error("cache: expected entries of one of its rows, found entries " + std::to_string(first) + ".." +
                std::to_string(first + count) + " of row " + std::to_string(row));
  }
  // The product of all dimensions was checked when the memory was allocated.
  const auto product = [&](std::size_t from, std::size_t to) {
    return static_cast<std::size_t>(std::accumulate(shape.begin() + static_cast<std::ptrdiff_t>(from),
                                                    shape.begin() + static_cast<std::ptrdiff_t>(to), std::int64_t{1},
                                                    std::multiplies<>()));
  };
  Entries found;
  found.lines = product(1, slots);
  found.entry = product(slots + 1, shape.size()) * size_of(buffer.type);
  found.pitch = found.entry * static_cast<std::size_t>(shape[slots]);
  found.start = reinterpret_cast<DevicePointer>(buffer.memory->data()) +
                static_cast<std::size_t>(row) * found.lines * found.pitch +
                static_cast<std::size_t>(first) * found.entry;
  return found;
}

class TensorRtBackend : public Backend {
 public:
  TensorRtBackend(std::shared_ptr<Library> library, std::map<std::string, Stored> chosen)
      : library_(std::move(library)), chosen_(std::move(chosen)), device_(std::make_shared<Device>()) {}

  // Device memory of caches is never moved.
  bool grows() const override { return false; }

  std::unique_ptr<Engine> open(const Graph& graph) override {
    return open_engine(graph, library_, device_, chosen_.at(graph.name).read());
  }

  std::shared_ptr<Memory> allocate(std::size_t bytes) override {
    const Turn turn(*device_);
    auto memory = std::make_shared<DeviceMemory>(device_, bytes);
    device_->wait();
    return memory;
  }

  void copy_entries(const Buffer& from, std::int64_t row, const Buffer& to, std::int64_t target, std::int64_t first,
                    std::int64_t count) override {
    const Entries source = entries_of(from, row, first, count), goal = entries_of(to, target, first, count);
    if (source.lines != goal.lines || source.entry != goal.entry) {
      throw Error("cache: expected buffers of the same heads and sizes, found others");
    }
    Copy2d copy = reading(source, count);
    copy.kind = kDeviceMemory;
    copy.device = goal.start;
    copy.pitch = goal.pitch;
    run(copy);
  }

  void read_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                    void* host) override {
    Copy2d copy = reading(entries_of(buffer, row, first, count), count);
    copy.kind = kHostMemory;
    copy.host = host;
    copy.pitch = copy.width;
    run(copy);
  }

  void write_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                     const void* host) override {
    const Entries goal = entries_of(buffer, row, first, count);
    Copy2d copy = reading(goal, count);
    copy.source_kind = kHostMemory;
    copy.source_host = host;
    copy.source_device = 0;
    copy.source_pitch = copy.width;
    copy.kind = kDeviceMemory;
    copy.device = goal.start;
    copy.pitch = goal.pitch;
    run(copy);
  }

 private:
  static Copy2d reading(const Entries& entries, std::int64_t count) {
    Copy2d copy;
    copy.source_kind = kDeviceMemory;
    copy.source_device = entries.start;
    copy.source_pitch = entries.pitch;
    copy.width = entries.entry * static_cast<std::size_t>(count);
    copy.height = entries.lines;
    return copy;
  }

  // Outside of the stream, which is idle: a turn ends only when its work is done.
  void run(const Copy2d& copy) {
    if (copy.width == 0 || copy.height == 0) return;
    const Turn turn(*device_);
    const Driver& driver = device_->driver();
    driver.cuMemcpy2DUnaligned(&copy);
    driver.cuStreamSynchronize(nullptr);  // a copy within the device may return before it is done
  }

  std::shared_ptr<Library> library_;
  std::map<std::string, Stored> chosen_;
  std::shared_ptr<Device> device_;
};

Gpu gpu_for(const std::string& kind) {
  try {
    return find_gpu();
  } catch (const Error& error) {
    throw Error("--backend " + kind + ": expected a GPU, found none (" + error.what() +
                "); --backend onnxruntime runs the same graphs");
  }
}

std::string plugins_hash(const std::string& path) {
  try {
    PlainFile readable(path, "a plugin library");
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + "; compile it first");
  }
  return hash_plain(path).sha256;
}

std::map<std::string, Stored> choose(const Bundle& bundle, const Here& here, bool trusted) {
  const std::vector<Stored> engines = stored_engines(bundle);
  std::map<std::string, Stored> chosen;
  for (const Graph& graph : bundle.manifest().graphs) {
    chosen.emplace(graph.name, engine_for(bundle, graph, engines, here));
  }
  for (const Graph& graph : bundle.manifest().graphs) {
    if (!trusted) chosen.at(graph.name).check_trust();
  }
  return chosen;
}

}  // namespace

}  // namespace tensorrt

std::shared_ptr<Backend> open_tensorrt_backend(const Bundle& bundle, const BackendOptions& options) {
  tensorrt::check_target(bundle);
  tensorrt::Here here;
  here.backend = options.kind;
  here.gpu = tensorrt::gpu_for(options.kind);
  if (!options.plugins.empty()) here.plugins_sha256 = tensorrt::plugins_hash(options.plugins);
  const std::shared_ptr<tensorrt::Library> library = tensorrt::Library::open(options.kind, options.library);
  here.version = library->version();
  std::map<std::string, tensorrt::Stored> chosen = tensorrt::choose(bundle, here, options.trust_engines);
  for (const auto& [graph, stored] : chosen) {
    if (!stored.record.plugins_sha256) continue;
    library->load_plugins(options.plugins);
    break;
  }
  return std::make_shared<tensorrt::TensorRtBackend>(library, std::move(chosen));
}

}  // namespace dynexport
