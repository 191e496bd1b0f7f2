// A matrix in blocks of integers, and rows for it.
#include "block_weights.hpp"

namespace dynexport::cpu {
namespace {

bool holds_zero(const Tensor& one) {
  if (one.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return *static_cast<const float*>(one.data) == 0;
  return (*static_cast<const std::uint16_t*>(one.data) & 0x7FFF) == 0;
}

}  // namespace

std::size_t BlockRows::bytes(const BlockMatrix& matrix, std::int64_t rows) {
  return static_cast<std::size_t>(rows * (matrix.columns() + matrix.blocks * 12));
}

BlockRows::BlockRows(const Kernels& kernels, const BlockMatrix& matrix, Scratch& memory, std::int64_t rows)
    : kernels_(kernels),
      blocks_(matrix.blocks),
      columns_(matrix.columns()),
      size_(matrix.size),
      zero_(matrix.zero),
      all_() {
  const std::int64_t places = rows * blocks_;
  all_.scales = memory.take<float>(places);
  all_.sums = memory.take<float>(places);
  all_.offsets = memory.take<std::int32_t>(places);
  all_.values = memory.take<std::int8_t>(rows * columns_);
}

void BlockRows::prepare(const float* x, std::int64_t first, int rows) const {
  kernels_.quantize(x, columns_, size_, zero_, rows, tile(first));
}

void BlockRows::multiply(const BlockMatrix& matrix, std::int64_t group, std::int64_t first, int rows, float* y,
                         std::int64_t stride) const {
  kernels_.block_tile(matrix, group, tile(first), rows, y, stride);
}

Activations BlockRows::tile(std::int64_t first) const {
  const std::int64_t place = first * blocks_;
  return {all_.values + first * columns_, all_.scales + place, all_.sums + place, all_.offsets + place};
}

BlockWeights::BlockWeights(const Ort::ConstKernelInfo& info, std::size_t first, std::int64_t rows,
                           const std::string& prefix, bool stacked)
    : first_(first),
      rows_(rows),
      bits_(static_cast<int>(attribute(info, (prefix + "bits").c_str(), 4, 8))),
      zero_(static_cast<int>(attribute(info, (prefix + "zero").c_str(), 0, 255))) {
  if (bits_ != 4 && bits_ != 8) refuse(prefix + "bits", "4 or 8", std::to_string(bits_));
  if (stacked) return;
  const auto quantized = constant(info, first), scales = constant(info, first + 1), minima = constant(info, first + 2);
  if (quantized && scales && minima) constant_ = checked(*quantized, *scales, *minima);
}

BlockMatrix BlockWeights::matrix(const Ort::KernelContext& context) const {
  if (constant_) return *constant_;
  return checked(tensor_of(context.GetInput(first_)), tensor_of(context.GetInput(first_ + 1)),
                 tensor_of(context.GetInput(first_ + 2)));
}

ONNXTensorElementDataType BlockWeights::part_type(std::size_t part) {
  // UNDEFINED: float32 or float16, which are told apart by what is found.
  return part == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

BlockMatrix BlockWeights::checked(const Tensor& quantized, const Tensor& scales, const Tensor& minima) const {
  const std::int64_t groups = (rows_ + kLanes - 1) / kLanes;
  const Shape& shape = quantized.shape;
  const bool whole = quantized.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 && shape.size() == 5 && shape[0] == groups &&
                     shape[1] > 0 && shape[3] == kLanes && shape[4] == 4;
  const std::int64_t size = whole ? shape[2] * 32 / bits_ : 0;
  if (size != 16 && size != 32)
    refuse("quantized", "uint8 [" + std::to_string(groups) + ", blocks, 16 or 32 values * bits / 32, 16, 4]",
           text_of(shape));
  const Shape of_blocks{groups, shape[1], kLanes};
  const bool half = scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if ((!half && scales.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) || scales.shape != of_blocks)
    refuse("scales", "float32 or float16 " + text_of(of_blocks), text_of(scales.shape));
  const bool none = product(minima.shape, 0, minima.shape.size()) == 1 && minima.shape.size() == 3;
  if (minima.type != scales.type || (minima.shape != of_blocks && !none) || (none && !holds_zero(minima)))
    refuse("minima", "the type of scales, and " + text_of(of_blocks) + ", or one zero", text_of(minima.shape));
  return {static_cast<const std::uint8_t*>(quantized.data),
          scales.data,
          none ? nullptr : minima.data,
          half,
          bits_,
          static_cast<int>(size),
          zero_,
          shape[1]};
}

}  // namespace dynexport::cpu
