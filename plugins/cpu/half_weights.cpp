// A matrix of 16-bit floats, and rows for it.
#include "half_weights.hpp"

namespace dynexport::cpu {

std::size_t HalfRows::bytes(const HalfMatrix& matrix, std::int64_t rows) {
  return static_cast<std::size_t>(rows * matrix.columns()) * sizeof(float);
}

HalfRows::HalfRows(const Kernels& kernels, const HalfMatrix& matrix, Scratch& memory, std::int64_t rows)
    : kernels_(kernels.halves), matrix_(matrix), all_(memory.take<float>(rows * matrix.columns())) {}

void HalfRows::prepare(const float* x, std::int64_t first, int rows) const {
  kernels_.prepare(matrix_, x, rows, all_ + first * matrix_.columns());
}

void HalfRows::multiply(const HalfMatrix& matrix, std::int64_t group, std::int64_t first, int rows, float* y,
                        std::int64_t stride) const {
  kernels_.tile(matrix, group, all_ + first * matrix.columns(), rows, y, stride);
}

HalfWeights::HalfWeights(const Ort::ConstKernelInfo& info, std::size_t first, std::int64_t rows, const std::string&,
                         bool stacked)
    : first_(first), rows_(rows) {
  if (stacked) return;
  if (const auto weights = constant(info, first)) constant_ = checked(*weights);
}

HalfMatrix HalfWeights::matrix(const Ort::KernelContext& context) const {
  return constant_ ? *constant_ : checked(tensor_of(context.GetInput(first_)));
}

HalfMatrix HalfWeights::checked(const Tensor& weights) const {
  const std::int64_t groups = (rows_ + kLanes - 1) / kLanes;
  const bool bfloat16 = weights.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  const Shape& shape = weights.shape;
  const bool known = bfloat16 || weights.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  const std::int64_t together = bfloat16 ? 2 : 1;
  if (!known || shape.size() != 4 || shape[0] != groups || shape[1] < 1 || shape[2] != kLanes || shape[3] != together ||
      shape[1] * together % 2 != 0)
    refuse("weights",
           "bfloat16 [" + std::to_string(groups) + ", K / 2, 16, 2], or float16 [" + std::to_string(groups) +
               ", K, 16, 1] with an even K",
           text_of(shape));
  return {static_cast<const std::uint16_t*>(weights.data), bfloat16, shape[1] * together};
}

ONNXTensorElementDataType HalfWeights::part_type(std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }

}  // namespace dynexport::cpu
