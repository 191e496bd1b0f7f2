// The rows of activations that a node reads and writes.
#include "rows.hpp"

namespace dynexport::cpu {

const Kernels& needed_kernels() {
  const Kernels* const chosen = chosen_kernels();
  if (chosen == nullptr)
    refuse("DYNEXPORT_CPU_KERNELS", "avx512-bf16, avx512-vnni, avx2 or portable, and a processor that has it",
           "another");
  return *chosen;
}

std::int64_t rows_of_matrix(const Ort::ConstKernelInfo& info, const char* name) {
  return attribute(info, name, 1, std::int64_t{1} << 40);
}

Activated activated(const Ort::KernelContext& context, std::size_t input, const char* name, std::int64_t columns) {
  const Tensor x = tensor_of(context.GetInput(input));
  if (x.shape.empty() || x.shape.back() != columns)
    refuse(name, "float32 [.., " + std::to_string(columns) + "]", text_of(x.shape));
  return {x.shape, product(x.shape, 0, x.shape.size() - 1), static_cast<const float*>(x.data)};
}

const float* norm_weights(const Ort::KernelContext& context, std::size_t input, std::int64_t columns) {
  const Tensor weights = tensor_of(context.GetInput(input));
  if (weights.shape != Shape{columns}) refuse("norm", "float32 " + text_of({columns}), text_of(weights.shape));
  return static_cast<const float*>(weights.data);
}

float* output_like(const Ort::KernelContext& context, const Activated& x, std::int64_t columns) {
  Shape shape = x.shape;
  shape.back() = columns;
  return context.GetOutput(0, shape).GetTensorMutableData<float>();
}

}  // namespace dynexport::cpu
