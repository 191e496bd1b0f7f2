// A stand-in for TensorRT 10.14 that computes: its engines are the names of ONNX files, which ONNX Runtime runs on
// memory of the stand-in for CUDA. It implements the classes of TensorRT's library as its headers declare them.
#define ORT_API_MANUAL_INIT
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "settings.hpp"
#include "tensorrt_classes.hpp"

extern "C" {
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data);
int cuStreamSynchronize(void* stream);
int standin_inside(const void* address, std::size_t bytes);
void standin_fail();
}

namespace standin {

namespace {

using nlohmann::json;
using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kScratch = 1000;
constexpr std::uintptr_t kAlignment = 256;

struct Told {
  json read = json::array(), plugins = json::array();
  int contexts = 0, runs = 0, in_place = 0, live = 0;
  ~Told() {
    report("tensorrt", {{"read", read},
                        {"plugins", plugins},
                        {"contexts", contexts},
                        {"runs", runs},
                        {"in_place", in_place},
                        {"live", live}});
  }
};

Told& told() {
  static Told made;
  return made;
}

Ort::Env& environment() {
  static Ort::Env* made = [] {
    void* library = dlopen(std::getenv("DYNEXPORT_ONNXRUNTIME"), RTLD_NOW | RTLD_LOCAL);
    const auto base =
        library == nullptr ? nullptr : reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    if (base == nullptr) unused("ONNX Runtime: give its library in DYNEXPORT_ONNXRUNTIME");
    Ort::InitApi(base()->GetApi(ORT_API_VERSION));
    return new Ort::Env(ORT_LOGGING_LEVEL_FATAL, "standin");
  }();
  return *made;
}

Ort::Session open_session(const std::string& model) {
  Ort::Env& shared = environment();
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  options.AddConfigEntry("session.disable_quant_qdq", "1");
  return Ort::Session(shared, model.c_str(), options);
}

// An input or output of an engine.
struct Port {
  std::string name;
  bool is_input = false;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

std::size_t element(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return 8;
    default:
      return 1;
  }
}

std::size_t bytes_of(const Port& port, const Shape& shape) {
  std::size_t bytes = element(port.type);
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  return bytes;
}

// What an engine is: a session, and its profiles: of each, the least, usual and greatest shape of inputs by name.
struct Program {
  Program(const std::string& model, json ranges, ILogger& told_to)
      : session(open_session(model)), profiles(std::move(ranges)), logger(told_to) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
      ports.push_back({session.GetInputNameAllocated(i, allocator).get(), true,
                       session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType()});
    }
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
      ports.push_back({session.GetOutputNameAllocated(i, allocator).get(), false,
                       session.GetOutputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType()});
    }
  }
  bool refuse(const std::string& reason) {
    logger.log(ILogger::Severity::kERROR, reason.c_str());
    return false;
  }

  Ort::Session session;
  json profiles;
  ILogger& logger;
  std::vector<Port> ports;
};

class Context : public EmptyContext {
 public:
  Context(IExecutionContext* face, std::shared_ptr<Program> program) : face_(face), program_(std::move(program)) {
    ++told().contexts;
    ++told().live;
  }
  ~Context() override { --told().live; }

  IExecutionContext* getPImpl() noexcept override { return face_; }

  bool setOptimizationProfileAsync(int32_t index, cudaStream_t) noexcept override {
    if (index < 0 || static_cast<std::size_t>(index) >= program_->profiles.size())
      return program_->refuse("no such profile");
    profile_ = program_->profiles[static_cast<std::size_t>(index)];
    return true;
  }

  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
    scratch_ = size >= kScratch && standin_inside(memory, static_cast<std::size_t>(size)) == 1;
  }

  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    Shape shape(dims.d, dims.d + dims.nbDims);
    ++changes_;
    bool fits = true;
    if (profile_.contains(name)) {
      const auto sizes = profile_[name].get<std::vector<Shape>>();
      fits = sizes[0].size() == shape.size();
      for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = sizes[0][i] <= shape[i] && shape[i] <= sizes[2][i];
    }
    shapes_[name] = std::move(shape);
    return fits || program_->refuse(std::string(name) + ": a shape that is not within the profile");
  }

  bool setTensorAddress(char const* name, void* data) noexcept override {
    ++changes_;
    addresses_[name] = data;
    return reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0 ||
           program_->refuse(std::string(name) + ": an address that is not aligned");
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    const std::string fails = setting("fails", std::string());
    if (!fails.empty()) return program_->refuse(fails);
    if (!scratch_) return program_->refuse("no memory for intermediate results");
    for (const Port& port : program_->ports) {
      if (addresses_.count(port.name) == 0) return program_->refuse(port.name + ": no address is set");
      if (!bound_in_place(port.name)) return program_->refuse(port.name + ": expected the address of its input");
    }
    if (setting("uncapturable", false)) cuStreamSynchronize(stream);
    // Freed with the context: a CUDA graph may repeat it.
    steps_.push_back(std::make_unique<Step>(Step{this, changes_}));
    return cuLaunchHostFunc(stream, &Context::run, steps_.back().get()) == 0;
  }

 private:
  struct Step {
    Context* context;
    int changes;
  };

  // TensorRT appends to a cache only where it is input and output at once.
  bool bound_in_place(const std::string& output) const {
    constexpr std::string_view kPresent = "present.";
    if (output.compare(0, kPresent.size(), kPresent) != 0) return true;
    const auto input = addresses_.find("past_key_values." + output.substr(kPresent.size()));
    const bool same = input != addresses_.end() && input->second == addresses_.at(output);
    told().in_place += same ? 1 : 0;
    return same;
  }

  static void run(void* data) {
    const Step& step = *static_cast<Step*>(data);
    try {
      if (step.changes != step.context->changes_) throw std::runtime_error("the context was changed after the capture");
      step.context->compute();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "stand-in for TensorRT: %s\n", error.what());
      standin_fail();
    }
  }

  void compute() {
    const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<const char*> inputs, outputs;
    std::vector<std::vector<char>> copies;
    std::vector<Ort::Value> values;
    for (const Port& port : program_->ports) {
      (port.is_input ? inputs : outputs).push_back(port.name.c_str());
      if (!port.is_input) continue;
      const Shape& shape = shapes_.at(port.name);
      const std::size_t bytes = bytes_of(port, shape);
      const char* from = static_cast<const char*>(checked(port, bytes));
      copies.emplace_back(from, from + bytes);
      values.push_back(
          Ort::Value::CreateTensor(cpu, copies.back().data(), bytes, shape.data(), shape.size(), port.type));
    }
    auto found = program_->session.Run(Ort::RunOptions(), inputs.data(), values.data(), values.size(), outputs.data(),
                                       outputs.size());
    std::size_t index = 0;
    for (const Port& port : program_->ports) {
      if (port.is_input) continue;
      const Ort::Value& value = found[index++];
      const std::size_t bytes = bytes_of(port, value.GetTensorTypeAndShapeInfo().GetShape());
      std::memcpy(checked(port, bytes), value.GetTensorRawData(), bytes);
    }
    ++told().runs;
  }

  void* checked(const Port& port, std::size_t bytes) {
    void* address = addresses_.at(port.name);
    if (standin_inside(address, bytes) == 0) throw std::runtime_error(port.name + ": not the device's memory");
    return address;
  }

  IExecutionContext* face_;
  std::shared_ptr<Program> program_;
  json profile_ = json::object();
  std::map<std::string, Shape> shapes_;
  std::map<std::string, void*> addresses_;
  std::vector<std::unique_ptr<Step>> steps_;
  bool scratch_ = false;
  int changes_ = 0;
};

// The classes that programs see call those above.
class ContextFace : public IExecutionContext {
 public:
  explicit ContextFace(std::shared_ptr<Program> program) : context_(this, std::move(program)) { mImpl = &context_; }

 private:
  Context context_;
};

class Engine : public EmptyEngine {
 public:
  Engine(ICudaEngine* face, std::shared_ptr<Program> program) : face_(face), program_(std::move(program)) {
    ++told().live;
  }
  ~Engine() override { --told().live; }
  ICudaEngine* getPImpl() noexcept override { return face_; }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
    if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) unused("memory of its own for contexts");
    return new ContextFace(program_);
  }
  int64_t getDeviceMemorySizeV2() const noexcept override { return kScratch; }

 private:
  ICudaEngine* face_;
  std::shared_ptr<Program> program_;
};

class EngineFace : public ICudaEngine {
 public:
  explicit EngineFace(std::shared_ptr<Program> program) : engine_(this, std::move(program)) { mImpl = &engine_; }

 private:
  Engine engine_;
};

class Runtime : public EmptyRuntime {
 public:
  Runtime(IRuntime* face, ILogger& logger) : face_(face), logger_(logger) { ++told().live; }
  ~Runtime() override { --told().live; }
  IRuntime* getPImpl() noexcept override { return face_; }
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    try {
      const json content = json::parse(std::string(static_cast<const char*>(blob), size));
      told().read.push_back(content.at("model"));
      const std::string refuses = setting("refuses", std::string());
      if (!refuses.empty()) throw std::runtime_error(refuses);
      return new EngineFace(std::make_shared<Program>(content.at("model"), content.at("profiles"), logger_));
    } catch (const std::exception& error) {
      logger_.log(ILogger::Severity::kERROR, error.what());
      return nullptr;
    }
  }

 private:
  IRuntime* face_;
  ILogger& logger_;
};

class RuntimeFace : public IRuntime {
 public:
  explicit RuntimeFace(ILogger& logger) : runtime_(this, logger) { mImpl = &runtime_; }

 private:
  Runtime runtime_;
};

class Registry : public EmptyRegistry {
 public:
  PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
    told().plugins.push_back(path);
    return dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  }
};

}  // namespace

}  // namespace standin

extern "C" {

int32_t getInferLibVersion() noexcept { return standin::setting("version", 101401); }
int32_t getInferLibBuildVersion() noexcept { return standin::setting("build", 48); }

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  if (version != NV_TENSORRT_VERSION) standin::unused("other version of its classes");
  return new standin::RuntimeFace(*static_cast<nvinfer1::ILogger*>(logger));
}

nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static standin::Registry registry;
  return &registry;
}
}
