// HalfMatMul and HalfGather.
#include "half_operators.hpp"

namespace dynexport::cpu {

HalfWeights::HalfWeights(const Ort::ConstKernelInfo& info) : rows_(attribute(info, "N", 1, std::int64_t{1} << 40)) {
  if (const auto weights = constant(info, 1)) constant_ = half_matrix(*weights, rows_);
}

HalfMatrix HalfWeights::matrix(const Ort::KernelContext& context) const {
  return constant_ ? *constant_ : half_matrix(tensor_of(context.GetInput(1)), rows_);
}

HalfMatrix half_matrix(const Tensor& weights, std::int64_t rows) {
  const std::int64_t groups = (rows + kLanes - 1) / kLanes;
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

ONNXTensorElementDataType HalfMatMul::input_type(std::size_t input) {
  return input == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

void multiply(const Kernels& kernels, const HalfMatrix& matrix, const Product& product) {
  if (product.rows() == 0) return;
  Scratch memory(static_cast<std::size_t>(product.rows() * matrix.columns) * sizeof(float));
  float* const tiles = memory.take<float>(product.rows() * matrix.columns);
  product.prepare([&](std::int64_t first, int count) {
    const std::int64_t place = first * matrix.columns;
    kernels.halves.prepare(matrix, product.x() + place, count, tiles + place);
  });
  product.multiply([&](std::int64_t group, std::int64_t first, int count, float* y, std::int64_t stride) {
    kernels.halves.tile(matrix, group, tiles + first * matrix.columns, count, y, stride);
  });
}

void HalfMatMul::run(const Ort::KernelContext& context) const {
  const HalfMatrix matrix = weights_.matrix(context);
  multiply(kernels_, matrix, Product(context, matrix.columns, weights_.rows()));
}

ONNXTensorElementDataType HalfGather::input_type(std::size_t input) {
  return input == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

void HalfGather::run(const Ort::KernelContext& context) const {
  const HalfMatrix matrix = weights_.matrix(context);
  gather(context, matrix.columns, weights_.rows(),
         [&](std::int64_t row, float* y) { kernels_.halves.row(matrix, row, y); });
}

}  // namespace dynexport::cpu
