// What the operators need of ONNX Runtime.
#include "context.hpp"

#include <cstdlib>
#include <memory>
#include <new>

namespace dynexport::cpu {
namespace {

constexpr std::size_t kKept = 16 << 20;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

Tensor tensor_of(const Ort::ConstValue& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  Shape shape = info.GetShape();
  const bool empty = product(shape, 0, shape.size()) == 0;
  return {info.GetElementType(), std::move(shape), empty ? nullptr : value.GetTensorRawData()};
}

std::string text_of(const Shape& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

void refuse(const std::string& what, const std::string& expected, const std::string& found) {
  throw Ort::Exception(what + ": expected " + expected + ", found " + found, ORT_INVALID_ARGUMENT);
}

std::int64_t product(const Shape& shape, std::size_t first, std::size_t last) {
  std::int64_t sizes = 1;
  for (std::size_t i = first; i < last; ++i) sizes *= shape[i];
  return sizes;
}

std::int64_t attribute(const Ort::ConstKernelInfo& info, const char* name, std::int64_t least, std::int64_t most) {
  const auto value = info.GetAttribute<std::int64_t>(name);
  if (value < least || value > most)
    refuse(name, std::to_string(least) + ".." + std::to_string(most), std::to_string(value));
  return value;
}

std::optional<Tensor> constant(const Ort::ConstKernelInfo& info, std::size_t input) {
  int is_constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(input, &is_constant);
  if (is_constant == 0) return std::nullopt;
  return tensor_of(value);
}

Scratch::Scratch(std::size_t bytes) {
  static thread_local std::unique_ptr<void, Free> kept;
  static thread_local std::size_t size = 0;
  if (bytes <= size) {
    next_ = static_cast<char*>(kept.get());
    return;
  }
  void* const made = std::malloc(bytes);
  if (made == nullptr) throw std::bad_alloc();
  next_ = static_cast<char*>(made);
  if (bytes <= kKept) {
    kept.reset(made);
    size = bytes;
  } else {
    own_ = made;
  }
}

Scratch::~Scratch() { std::free(own_); }

}  // namespace dynexport::cpu
