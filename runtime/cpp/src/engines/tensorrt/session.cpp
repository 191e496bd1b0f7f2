#include "engines/tensorrt/session.hpp"

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "dynexport/error.hpp"
#include "engines/sizes.hpp"
#include "engines/tensorrt/profiles.hpp"

namespace dynexport::tensorrt {

namespace {

// TensorRT requires addresses to be multiples of this.
constexpr DevicePointer kAlignment = 256;

std::size_t checked_bytes(const std::string& name, Type type, const std::vector<std::int64_t>& shape) {
  const std::optional<std::size_t> bytes = bytes_of(shape, type);
  if (!bytes) throw Error(name + ": expected a size that fits in memory, found a larger or a negative one");
  return *bytes;
}

// What the bindings of an engine share: the engine, memory of intermediate results, and contexts that no binding uses.
// A CUDA graph is valid only while the context that it was captured from is unchanged, so each binding has its own.
struct Shared {
  Graph graph;
  std::shared_ptr<Device> device;
  std::shared_ptr<LoadedEngine> engine;
  std::unique_ptr<DeviceMemory> scratch;
  std::map<int, std::vector<std::unique_ptr<Context>>> idle;  // by profile; used in a turn

  std::unique_ptr<Context> context(int profile) {
    std::vector<std::unique_ptr<Context>>& there = idle[profile];
    if (there.empty()) {
      auto made =
          std::make_unique<Context>(engine, profile, device->stream(), scratch->data(), engine->scratch_bytes());
      device->wait();
      return made;
    }
    std::unique_ptr<Context> taken = std::move(there.back());
    there.pop_back();
    return taken;
  }
};

// Arrays of inputs or results, in host and device memory.
class Arrays {
 public:
  void add(const TensorSpec& spec, std::vector<std::int64_t> shape) {
    places_.emplace(spec.name, tensors_.size());
    sizes_.push_back(checked_bytes(spec.name, spec.type, shape));
    tensors_.push_back({spec.type, std::move(shape), nullptr});
  }
  void allocate(const std::shared_ptr<Device>& device) {
    memory_.emplace(device, sizes_);
    for (std::size_t i = 0; i < tensors_.size(); ++i) tensors_[i].data = memory_->host(i);
  }
  void bind(Context& context) const {
    for (const auto& [name, place] : places_) context.set_address(name, memory_->device(place));
  }
  void bind_shapes(Context& context) const {
    for (const auto& [name, place] : places_) context.set_shape(name, tensors_[place].shape);
  }
  const Tensor* find(const std::string& name) const {
    const auto found = places_.find(name);
    return found == places_.end() ? nullptr : &tensors_[found->second];
  }
  const Mirror& memory() const { return *memory_; }

 private:
  std::map<std::string, std::size_t> places_;
  std::vector<std::size_t> sizes_;
  std::vector<Tensor> tensors_;
  std::optional<Mirror> memory_;
};

// Rows of a cache that do not begin at an aligned address: they are copied to memory that does, and back.
struct Detour {
  Detour(const std::shared_ptr<Device>& device, DevicePointer its_rows, std::size_t its_bytes)
      : own(device, its_bytes), rows(its_rows), bytes(its_bytes) {}

  DeviceMemory own;
  DevicePointer rows;
  std::size_t bytes;
};

class TensorRtBinding : public Binding {
 public:
  TensorRtBinding(std::shared_ptr<Shared> shared, const Shapes& shapes, const Caches& caches)
      : shared_(std::move(shared)), buffers_(caches.buffers) {
    const auto sizes = sizes_of(shared_->graph, shapes);
    profile_ = profile_for(shared_->graph, sizes);
    for (const TensorSpec& spec : shared_->graph.inputs) {
      if (is_cache_input(spec)) continue;
      const auto shape = shapes.find(spec.name);
      if (shape == shapes.end())
        throw Error("graph " + shared_->graph.name + ": expected an input " + spec.name + ", found none");
      inputs_.add(spec, shape->second);
    }
    for (const TensorSpec& spec : shared_->graph.outputs) {
      if (!is_cache_output(spec)) results_.add(spec, sized(spec, sizes));
    }
    // Only decode steps repeat their shapes, so only they are worth capturing.
    may_capture_ = true;
    for (const auto& [symbol, size] : sizes) may_capture_ = may_capture_ && (symbol == "B" || size == 1);
    const Turn turn(*shared_->device);
    inputs_.allocate(shared_->device);
    results_.allocate(shared_->device);
    context_ = shared_->context(profile_);
    inputs_.bind_shapes(*context_);
    inputs_.bind(*context_);
    results_.bind(*context_);
    bind_caches(caches);
    shared_->device->wait();  // memory is zero now
  }

  ~TensorRtBinding() override {
    try {
      const Turn turn(*shared_->device);
      shared_->device->settle();
      replay_.reset();
      shared_->idle[profile_].push_back(std::move(context_));
    } catch (const std::exception&) {  // the driver is shutting down; the context is freed
    }
  }
  TensorRtBinding(const TensorRtBinding&) = delete;
  TensorRtBinding& operator=(const TensorRtBinding&) = delete;

  Tensor input(const std::string& name) override { return found(inputs_, name, "an input"); }
  Tensor result(const std::string& name) override { return found(results_, name, "a result"); }
  bool has_result(const std::string& name) const override { return results_.find(name) != nullptr; }

  void run() override {
    Device& device = *shared_->device;
    const Turn turn(device);
    try {
      inputs_.memory().copy_in();
      if (replay_ != nullptr) {
        replay_->launch();
      } else {
        launch();
      }
      results_.memory().copy_out();
      device.wait();
    } catch (const Error&) {
      device.settle();
      throw;
    }
    if (!ran_ && may_capture_) {
      // Only after the first run, in which TensorRT allocates memory: an allocation would end the capture.
      replay_ = device.capture([this] { launch(); });
    }
    ran_ = true;
  }

 private:
  Tensor found(const Arrays& arrays, const std::string& name, const char* what) const {
    const Tensor* tensor = arrays.find(name);
    if (tensor == nullptr)
      throw Error("graph " + shared_->graph.name + ": expected " + what + " of the graph, found " + name);
    return *tensor;
  }

  // Binds input and output of every cache to the same memory.
  void bind_caches(const Caches& caches) {
    const std::string prefix = caches.place ? std::to_string(*caches.place) + "." : "";
    for (const TensorSpec& spec : shared_->graph.inputs) {
      if (!is_cache_input(spec)) continue;
      const std::string part = spec.name.substr(kPast.size());
      bind_cache(part, buffer_of(prefix + part), caches);
    }
  }

  const Buffer& buffer_of(const std::string& name) const {
    if (buffers_ == nullptr || buffers_->by_name.count(name) == 0) {
      throw Error("graph " + shared_->graph.name + ": expected a cache " + name + ", found none");
    }
    return buffers_->by_name.at(name);
  }

  void bind_cache(const std::string& part, const Buffer& buffer, const Caches& caches) {
    std::vector<std::int64_t> shape = buffer.shape;
    if (shape.empty() || caches.first < 0 || caches.rows < 0 || caches.first > shape[0] - caches.rows) {
      throw Error("graph " + shared_->graph.name + ": cache " + part + ": expected rows of the cache, found others");
    }
    shape[0] = 1;
    const std::size_t row = checked_bytes(part, buffer.type, shape);
    shape[0] = caches.rows;
    const std::size_t bytes = row * static_cast<std::size_t>(caches.rows);
    DevicePointer address = reinterpret_cast<DevicePointer>(buffer.memory->data());
    address += row * static_cast<std::size_t>(caches.first);
    if (address % kAlignment != 0) {
      detours_.push_back(std::make_unique<Detour>(shared_->device, address, bytes));
      address = detours_.back()->own.address();
    }
    context_->set_shape(std::string(kPast) + part, shape);
    context_->set_address(std::string(kPast) + part, address);
    context_->set_address(std::string(kPresent) + part, address);
  }

  void launch() {
    const Device& device = *shared_->device;
    for (const auto& detour : detours_) device.copy(detour->own.address(), detour->rows, detour->bytes);
    context_->enqueue(device.stream());
    for (const auto& detour : detours_) device.copy(detour->rows, detour->own.address(), detour->bytes);
  }

  std::shared_ptr<Shared> shared_;
  std::shared_ptr<const Buffers> buffers_;
  int profile_ = 0;
  Arrays inputs_, results_;
  std::vector<std::unique_ptr<Detour>> detours_;
  std::unique_ptr<Context> context_;
  std::unique_ptr<Replay> replay_;
  bool may_capture_ = false, ran_ = false;
};

class TensorRtEngine : public Engine {
 public:
  explicit TensorRtEngine(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}
  const Graph& graph() const override { return shared_->graph; }
  std::unique_ptr<Binding> bind(const Shapes& inputs, const Caches& caches) override {
    return std::make_unique<TensorRtBinding>(shared_, inputs, caches);
  }

 private:
  std::shared_ptr<Shared> shared_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const Graph& graph, const std::shared_ptr<Library>& library,
                                    const std::shared_ptr<Device>& device, const std::string& content) {
  const Turn turn(*device);
  auto shared = std::make_shared<Shared>();
  shared->graph = graph;
  shared->device = device;
  shared->engine = std::make_shared<LoadedEngine>(library, graph.name, content);
  const std::int64_t bytes = shared->engine->scratch_bytes();
  shared->scratch = std::make_unique<DeviceMemory>(device, bytes < 0 ? 0 : static_cast<std::size_t>(bytes));
  device->wait();
  return std::make_unique<TensorRtEngine>(std::move(shared));
}

}  // namespace dynexport::tensorrt
