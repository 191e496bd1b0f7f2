// What all products have in common.
#include "rows.hpp"

namespace dynexport::cpu {

const Kernels& needed_kernels() {
  const Kernels* const chosen = chosen_kernels();
  if (chosen == nullptr)
    refuse("DYNEXPORT_CPU_KERNELS", "avx512-bf16, avx512-vnni, avx2 or portable, and a processor that has it",
           "another");
  return *chosen;
}

Product::Product(const Ort::KernelContext& context, std::int64_t columns, std::int64_t results)
    : context_(context), columns_(columns), results_(results) {
  const Tensor x = tensor_of(context.GetInput(0));
  if (x.shape.empty() || x.shape.back() != columns)
    refuse("x", "float32 [.., " + std::to_string(columns) + "]", text_of(x.shape));
  rows_ = product(x.shape, 0, x.shape.size() - 1);
  x_ = static_cast<const float*>(x.data);
  Shape shape = x.shape;
  shape.back() = results;
  y_ = context.GetOutput(0, shape).GetTensorMutableData<float>();
}

}  // namespace dynexport::cpu
