// BlockGather, HalfGather: rows of a matrix.
#pragma once

#include "rows.hpp"

namespace dynexport::cpu {

inline void write_row(const Kernels& kernels, const BlockMatrix& matrix, std::int64_t row, float* y) {
  kernels.block_row(matrix, row, y);
}
inline void write_row(const Kernels& kernels, const HalfMatrix& matrix, std::int64_t row, float* y) {
  kernels.halves.row(matrix, row, y);
}

// The rows of W at the indices of input 0; as in ONNX, -1 is the last row.
template <class Weights>
class Gather : public Computed<Gather<Weights>> {
 public:
  static constexpr const char* kName = Weights::kGather;
  static constexpr std::size_t kInputs = 1 + Weights::kParts;
  static ONNXTensorElementDataType input_type(std::size_t input) {
    return input == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : Weights::part_type(input - 1);
  }

  explicit Gather(const Ort::ConstKernelInfo& info)
      : kernels_(needed_kernels()), weights_(info, 1, rows_of_matrix(info)) {}

  void run(const Ort::KernelContext& context) const {
    const auto matrix = weights_.matrix(context);
    const std::int64_t columns = matrix.columns(), rows = weights_.rows();
    const Tensor indices = tensor_of(context.GetInput(0));
    Shape shape = indices.shape;
    const std::int64_t count = product(shape, 0, shape.size());
    shape.push_back(columns);
    float* const y = context.GetOutput(0, shape).template GetTensorMutableData<float>();
    const auto* const at = static_cast<const std::int64_t*>(indices.data);
    for (std::int64_t i = 0; i < count; ++i)
      if (at[i] < -rows || at[i] >= rows)
        refuse("indices", std::to_string(-rows) + ".." + std::to_string(rows - 1), std::to_string(at[i]));
    for_each(context, count, count * columns * 8,
             [&](std::int64_t i) { write_row(kernels_, matrix, at[i] < 0 ? at[i] + rows : at[i], y + i * columns); });
  }

 private:
  const Kernels& kernels_;
  Weights weights_;
};

}  // namespace dynexport::cpu
