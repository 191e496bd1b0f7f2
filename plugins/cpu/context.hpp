// What the operators need of ONNX Runtime: checked tensors, threads, scratch memory, errors.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace dynexport::cpu {

using Shape = std::vector<std::int64_t>;

// An input; ``data`` is null where it is empty.
struct Tensor {
  ONNXTensorElementDataType type;
  Shape shape;
  const void* data;
};

Tensor tensor_of(const Ort::ConstValue& value);
std::string text_of(const Shape& shape);

// Throws an error that ONNX Runtime reports: what was expected of an input or attribute, and what was found.
[[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& found);

// The product of the dimensions from ``first`` to before ``last``.
std::int64_t product(const Shape& shape, std::size_t first, std::size_t last);

// An integer attribute within bounds.
std::int64_t attribute(const Ort::ConstKernelInfo& info, const char* name, std::int64_t least, std::int64_t most);

// An input that is a constant of the graph, if it is one; constants of a graph around this one are not found.
std::optional<Tensor> constant(const Ort::ConstKernelInfo& info, std::size_t input);

// Below, threads cost more than they save.
constexpr std::int64_t kWorthThreads = 1 << 17;

// Calls of_index(0) to of_index(total - 1) on ONNX Runtime's threads, or on this one where there is little to do.
template <class Function>
void for_each(const Ort::KernelContext& context, std::int64_t total, std::int64_t operations,
              const Function& of_index) {
  if (operations < kWorthThreads) {
    for (std::int64_t i = 0; i < total; ++i) of_index(i);
    return;
  }
  const auto call = [](void* function, std::size_t i) {
    (*static_cast<const Function*>(function))(static_cast<std::int64_t>(i));
  };
  context.ParallelFor(call, static_cast<std::size_t>(total), 0, const_cast<Function*>(&of_index));
}

// Memory for one call; moderate sizes are kept by the thread for its next one.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(std::int64_t count) {
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += static_cast<std::size_t>(count) * sizeof(T);
    return taken;
  }

 private:
  char* next_;
  void* own_ = nullptr;
};

// An operator whose kernel is ``Kernel``: its constructor takes the node's description, ``run`` a call.
template <class Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Kernel, true> {
  Operator() { Kernel::describe(*this); }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** made) const {
    try {
      *made = new Kernel(Ort::ConstKernelInfo(info));
      return nullptr;
    } catch (const Ort::Exception& error) {
      return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
  const char* GetName() const { return Kernel::kName; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  std::size_t GetInputTypeCount() const { return Kernel::kInputs; }
  ONNXTensorElementDataType GetInputType(std::size_t i) const { return Kernel::input_type(i); }
  std::size_t GetOutputTypeCount() const { return Kernel::kOutputs; }
  ONNXTensorElementDataType GetOutputType(std::size_t i) const { return Kernel::output_type(i); }
};

// The part of a kernel that ONNX Runtime calls, and what most kernels have in common.
template <class Kernel>
struct Computed {
  static constexpr std::size_t kOutputs = 1;
  static ONNXTensorElementDataType output_type(std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  static void describe(OrtCustomOp&) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    try {
      static_cast<const Kernel*>(this)->run(Ort::KernelContext(context));
      return nullptr;
    } catch (const Ort::Exception& error) {
      return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
};

}  // namespace dynexport::cpu
