// ONNX Runtime as a backend: one session per graph; a cache's input and output share memory, so nothing is copied.
#include "engines/onnxruntime.hpp"

#include <algorithm>
#include <map>
#include <new>
#include <set>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "engines/cpu_operators.hpp"
#include "engines/host_memory.hpp"
#include "engines/onnxruntime_library.hpp"
#include "engines/sizes.hpp"

namespace dynexport {
namespace {

constexpr const char* kCpu = "CPUExecutionProvider";
constexpr const char* kCuda = "CUDAExecutionProvider";

ONNXTensorElementDataType element_of(Type type) {
  switch (type) {
    case Type::kFloat:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Type::kFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Type::kBfloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Type::kInt8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case Type::kInt32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case Type::kInt64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case Type::kBool:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  }
  throw Error("tensor: expected a known element type, found another");
}

// An input of a file that a part of it does not take.
struct OtherInput {
  std::string name;
  std::vector<std::int64_t> shape;
  ONNXTensorElementDataType type;
  std::int64_t value;  // of a scalar
};

Ort::Value value_of(const Tensor& tensor) {
  static const auto host = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor(host, tensor.data, tensor.bytes(), tensor.shape.data(), tensor.shape.size(),
                                  element_of(tensor.type));
}

// An I/O binding for one set of input shapes and cache rows; a step only writes the values of inputs.
class OrtBinding : public Binding {
 public:
  OrtBinding(std::shared_ptr<Ort::Session> session, const Graph& graph, const Shapes& inputs, const Caches& caches,
             std::shared_ptr<const std::vector<OtherInput>> others)
      : session_(std::move(session)),
        graph_(graph),
        buffers_(caches.buffers),
        others_(std::move(others)),
        binding_(*session_) {
    for (const OtherInput& other : *others_) bind(other);
    const auto sizes = sizes_of(graph, inputs);
    for (const TensorSpec& spec : graph.inputs) {
      if (is_cache_input(spec)) {
        bind_cache(spec, caches);
        continue;
      }
      const auto shape = inputs.find(spec.name);
      if (shape == inputs.end())
        throw Error(graph.file + ": ONNX Runtime failed in a step: expected the input " + shown(spec.name) +
                    ", found none");
      binding_.BindInput(spec.name.c_str(), value_of(add(inputs_, spec, shape->second)));
    }
    for (const TensorSpec& spec : graph.outputs)
      if (!is_cache_output(spec))
        binding_.BindOutput(spec.name.c_str(), value_of(add(results_, spec, sized(spec, sizes))));
  }

  Tensor input(const std::string& name) override { return found(inputs_, name); }
  Tensor result(const std::string& name) override { return found(results_, name); }
  bool has_result(const std::string& name) const override { return results_.count(name) > 0; }

  void run() override {
    try {
      session_->Run(options_, binding_);
    } catch (const Ort::Exception& error) {
      throw Error(graph_.file + ": ONNX Runtime failed in a step: " + reason_of(error));
    }
  }

 private:
  using Tensors = std::map<std::string, Tensor>;

  // Binds an input that has no elements, or is a scalar.
  void bind(const OtherInput& other) {
    static const auto host = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto* data = const_cast<std::int64_t*>(&other.value);  // an input, which is only read
    binding_.BindInput(other.name.c_str(), Ort::Value::CreateTensor(host, data, sizeof other.value, other.shape.data(),
                                                                    other.shape.size(), other.type));
  }

  const Tensor& add(Tensors& tensors, const TensorSpec& spec, std::vector<std::int64_t> shape) {
    const auto bytes = bytes_of(shape, spec.type);
    if (!bytes) throw Error(graph_.file + ": " + spec.name + ": expected sizes that memory can have, found others");
    memory_.push_back(host_memory(*bytes));
    return tensors[spec.name] = Tensor{spec.type, std::move(shape), memory_.back()->data()};
  }

  // Binds the call's rows of a cache's buffer, in place.
  void bind_cache(const TensorSpec& spec, const Caches& caches) {
    const std::string part = spec.name.substr(kPast.size());
    const std::string name = caches.place ? std::to_string(*caches.place) + "." + part : part;
    const auto found = caches.buffers->by_name.find(name);
    if (found == caches.buffers->by_name.end())
      throw Error(graph_.file + ": expected a cache " + shown(name) + ", found none");
    const Buffer& buffer = found->second;
    if (caches.first < 0 || caches.rows < 0 || caches.first > buffer.shape.at(0) - caches.rows)
      throw Error(graph_.file + ": expected rows of the caches, found others");
    Tensor rows{buffer.type, buffer.shape, nullptr};
    rows.shape[0] = 1;
    const std::size_t row = rows.bytes();
    rows.shape[0] = caches.rows;
    rows.data = static_cast<std::byte*>(buffer.memory->data()) + static_cast<std::size_t>(caches.first) * row;
    const Ort::Value value = value_of(rows);
    binding_.BindInput(spec.name.c_str(), value);
    binding_.BindOutput((std::string(kPresent) + part).c_str(), value);
  }

  const Tensor& found(const Tensors& tensors, const std::string& name) const {
    const auto tensor = tensors.find(name);
    if (tensor == tensors.end()) throw Error(graph_.file + ": expected a tensor " + shown(name) + ", found none");
    return tensor->second;
  }

  std::shared_ptr<Ort::Session> session_;
  const Graph graph_;
  std::shared_ptr<const Buffers> buffers_;  // keeps the memory
  std::shared_ptr<const std::vector<OtherInput>> others_;
  std::vector<std::shared_ptr<Memory>> memory_;
  Tensors inputs_, results_;
  Ort::RunOptions options_;
  Ort::IoBinding binding_;
};

void add_cuda(Ort::SessionOptions& options) {
  const OrtApi& api = Ort::GetApi();
  OrtCUDAProviderOptionsV2* made = nullptr;
  Ort::ThrowOnError(api.CreateCUDAProviderOptions(&made));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> provider(
      made, api.ReleaseCUDAProviderOptions);
  const char *key = "use_tf32", *value = "0";  // TensorFloat-32 keeps only 11 significant bits
  Ort::ThrowOnError(api.UpdateCUDAProviderOptions(made, &key, &value, 1));
  options.AppendExecutionProvider_CUDA_V2(*made);
}

struct SessionSettings {
  int threads = 0;        // intra-op threads; 0 lets ONNX Runtime choose
  bool cuda = false;      // whether the CUDA provider runs the graph
  bool packed = true;     // whether weights are rearranged at load; false uses them from the mapped file
  std::string operators;  // the library of CPU operators; empty: their bodies run
  bool alone = true;      // whether workers may spin between steps: no other session has much work
};

// Python's runtime/engines/onnxruntime.py sets enable_mem_reuse too, by Graph::share_memory: it only shortens loading,
// and the C interface has no such option.
Ort::SessionOptions options_for(const Graph& graph, const SessionSettings& how) {
  Ort::SessionOptions options;
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);  // its exceptions carry the messages
  if (how.threads > 0) options.SetIntraOpNumThreads(how.threads);
  // Keep weights out of the arena, which would round their memory up.
  options.AddConfigEntry("session.use_device_allocator_for_initializers", "1");
  // Graphs for TensorRT dequantise weights explicitly. Fusing would also round activations, and inside an If the fused
  // product does not find its weights.
  if (!graph.profiles.empty()) options.AddConfigEntry("session.disable_quant_qdq", "1");
  // Spinning workers of one session would take the cores from the other.
  if (!how.alone) options.AddConfigEntry("session.intra_op.allow_spinning", "0");
  // A step is many calls of parts: workers must be awake in the next one too.
  if (graph.part) options.AddConfigEntry("session.intra_op.spin_duration_us", "1000");
  if (!how.packed) options.AddConfigEntry("session.disable_prepacking", "1");
  if (how.cuda) add_cuda(options);
  if (!how.operators.empty()) options.RegisterCustomOpsLibrary(how.operators.c_str());
  return options;
}

// A session of one graph, or of the file that it is a part of.
class OrtEngine : public Engine {
 public:
  // An engine of another part of the same file, which shares the session.
  OrtEngine(const OrtEngine& other, const Graph& graph) : graph_(graph), session_(other.session_) {
    others_ = inputs_of_other_parts();
  }

  OrtEngine(const std::filesystem::path& path, const Graph& graph, const SessionSettings& how) : graph_(graph) {
    const bool bfloat16 = std::any_of(graph.inputs.begin(), graph.inputs.end(),
                                      [](const TensorSpec& spec) { return spec.type == Type::kBfloat16; });
    if (bfloat16 && !how.cuda)
      throw Error(path.string() +
                  ": expected float32 or float16 caches, found bfloat16, which ONNX Runtime's CPU provider cannot "
                  "compute; convert with --precision fp16 or fp32, or build an engine with: dynexport build");
    try {
      session_ = std::make_shared<Ort::Session>(onnxruntime_environment(), path.c_str(), options_for(graph, how));
    } catch (const Ort::Exception& error) {
      throw Error(path.string() + ": ONNX Runtime refuses the graph: " + reason_of(error));
    }
    check_inputs(path.string());
    others_ = inputs_of_other_parts();
  }

  const Graph& graph() const override { return graph_; }

  std::unique_ptr<Binding> bind(const Shapes& inputs, const Caches& caches) override {
    try {
      return std::make_unique<OrtBinding>(session_, graph_, inputs, caches, others_);
    } catch (const Ort::Exception& error) {
      throw Error(graph_.file + ": ONNX Runtime failed in a step: " + reason_of(error));
    } catch (const std::bad_alloc&) {
      throw Error(graph_.file + ": expected memory for a step, found too little; lower the batch or the chunk");
    }
  }

 private:
  void check_inputs(const std::string& path) const {
    std::set<std::string> expected, found, differ;
    for (const TensorSpec& spec : graph_.inputs) expected.insert(spec.name);
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_->GetInputCount(); ++i)
      found.insert(session_->GetInputNameAllocated(i, allocator).get());
    if (graph_.part) {  // those of other parts are given empty
      expected.insert(std::string(kPart));
      std::set<std::string> own;
      std::set_intersection(expected.begin(), expected.end(), found.begin(), found.end(),
                            std::inserter(own, own.end()));
      found = std::move(own);
    }
    std::set_symmetric_difference(expected.begin(), expected.end(), found.begin(), found.end(),
                                  std::inserter(differ, differ.end()));
    if (!differ.empty())
      throw Error(path + ": expected the inputs that the manifest names, found " + shown(*differ.begin()) +
                  " in one of the two only");
  }

  // The inputs of the file that this part does not take: empty, or scalars 0; and the part's number.
  std::shared_ptr<const std::vector<OtherInput>> inputs_of_other_parts() const {
    auto made = std::make_shared<std::vector<OtherInput>>();
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; graph_.part && i < session_->GetInputCount(); ++i) {
      const std::string name = session_->GetInputNameAllocated(i, allocator).get();
      if (graph_.takes(name)) continue;
      const Ort::TypeInfo type = session_->GetInputTypeInfo(i);
      const auto tensor = type.GetTensorTypeAndShapeInfo();
      std::vector<std::int64_t> shape = tensor.GetShape();
      for (std::int64_t& size : shape) size = std::max<std::int64_t>(size, 0);
      const bool scalar = std::find(shape.begin(), shape.end(), 0) == shape.end();
      if (scalar && !shape.empty())
        throw Error(graph_.file + ": expected the input " + shown(name) + " to have a symbol or to be a scalar, " +
                    "found neither; convert again");
      made->push_back({name, shape, tensor.GetElementType(), name == kPart ? *graph_.part : 0});
    }
    return made;
  }

  const Graph graph_;
  std::shared_ptr<Ort::Session> session_;
  std::shared_ptr<const std::vector<OtherInput>> others_;
};

class OrtBackend : public HostBackend {
 public:
  OrtBackend(std::shared_ptr<const Bundle> bundle, SessionSettings how)
      : bundle_(std::move(bundle)), how_(std::move(how)) {}

  bool grows() const override { return !how_.cuda; }

  std::unique_ptr<Engine> open(const Graph& graph) override {
    const auto first = first_.find(graph.file);
    if (first != first_.end()) return std::make_unique<OrtEngine>(first->second, graph);
    // Beside a file of parts, which has the weights of all layers, only a graph that decodes has much work, and never
    // at the same time.
    SessionSettings how = how_;
    const std::vector<Graph>& graphs = bundle_->manifest().graphs;
    const bool parts = std::any_of(graphs.begin(), graphs.end(), [](const Graph& other) { return bool(other.part); });
    how.alone = graphs.size() == 1 || graph.part || (parts && !graph.layers.empty());
    if (graph.takes("forced_choices")) how.threads = 1;  // a router is too small for two
    auto engine = std::make_unique<OrtEngine>(bundle_->path() / graph.file, graph, how);
    if (graph.part) first_.emplace(graph.file, OrtEngine(*engine, graph));
    return engine;
  }

 private:
  std::shared_ptr<const Bundle> bundle_;
  SessionSettings how_;
  std::map<std::string, OrtEngine> first_;  // of each file with parts; the others share its session
};

void check_provider(const std::string& provider) {
  std::string names;
  for (const std::string& name : Ort::GetAvailableProviders()) {
    if (name == provider) return;
    names += (names.empty() ? "" : ", ") + name;
  }
  throw Error("onnxruntime: expected " + provider + ", found " + names + "; install onnxruntime-gpu in its place");
}

}  // namespace

std::shared_ptr<Backend> open_onnxruntime_backend(std::shared_ptr<const Bundle> bundle, const BackendOptions& options,
                                                  bool cuda) {
  open_onnxruntime(options.library);
  check_provider(cuda ? kCuda : kCpu);
  // On a GPU, the bodies spare copies to the CPU and back.
  SessionSettings how;
  if (!cuda && !bundle->manifest().operators.empty()) how.operators = cpu_operators(options.plugins);
  how.threads = options.threads;
  how.cuda = cuda;
  how.packed = options.weights == "packed";
  return std::make_shared<OrtBackend>(std::move(bundle), how);
}

}  // namespace dynexport
