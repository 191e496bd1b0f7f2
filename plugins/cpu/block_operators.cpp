// BlockMatMul and BlockGather.
#include "block_operators.hpp"

namespace dynexport::cpu {
namespace {

constexpr std::int64_t kMostRowsOfMatrix = std::int64_t{1} << 40;

bool holds_zero(const Tensor& one) {
  if (one.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return *static_cast<const float*>(one.data) == 0;
  return (*static_cast<const std::uint16_t*>(one.data) & 0x7FFF) == 0;
}

// Cuts the rows of x into tiles and rounds them.
class RoundedRows {
 public:
  RoundedRows(const Kernels& kernels, const BlockMatrix& matrix, const float* x, std::int64_t rows)
      : blocks_(matrix.blocks),
        columns_(matrix.blocks * matrix.size),
        memory_(static_cast<std::size_t>(rows * (columns_ + blocks_ * 12))) {
    const std::int64_t places = rows * blocks_;
    all_.scales = memory_.take<float>(places);
    all_.sums = memory_.take<float>(places);
    all_.offsets = memory_.take<std::int32_t>(places);
    all_.values = memory_.take<std::int8_t>(rows * columns_);
    kernels_ = &kernels;
    matrix_ = &matrix;
    x_ = x;
  }

  // The rows from ``first`` on, at which a tile begins.
  Activations tile(std::int64_t first) const {
    const std::int64_t place = first * blocks_;
    return {all_.values + first * columns_, all_.scales + place, all_.sums + place, all_.offsets + place};
  }
  void round(std::int64_t first, int rows) const {
    kernels_->quantize(x_ + first * columns_, columns_, matrix_->size, matrix_->zero, rows, tile(first));
  }

 private:
  std::int64_t blocks_, columns_;
  Scratch memory_;
  Activations all_;
  const Kernels* kernels_;
  const BlockMatrix* matrix_;
  const float* x_;
};

}  // namespace

ONNXTensorElementDataType type_of_block_part(std::size_t part) {
  // UNDEFINED: float32 or float16, which are told apart by what is found.
  return part == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

BlockForm::BlockForm(const Ort::ConstKernelInfo& info)
    : rows_(attribute(info, "N", 1, kMostRowsOfMatrix)),
      bits_(static_cast<int>(attribute(info, "bits", 4, 8))),
      zero_(static_cast<int>(attribute(info, "zero", 0, 255))) {
  if (bits_ != 4 && bits_ != 8) refuse("bits", "4 or 8", std::to_string(bits_));
}

BlockWeights::BlockWeights(const Ort::ConstKernelInfo& info) : form_(info) {
  const auto quantized = constant(info, 1), scales = constant(info, 2), minima = constant(info, 3);
  if (quantized && scales && minima) constant_ = form_.checked(*quantized, *scales, *minima);
}

BlockMatrix BlockWeights::matrix(const Ort::KernelContext& context) const {
  if (constant_) return *constant_;
  return form_.checked(tensor_of(context.GetInput(1)), tensor_of(context.GetInput(2)), tensor_of(context.GetInput(3)));
}

BlockMatrix BlockForm::checked(const Tensor& quantized, const Tensor& scales, const Tensor& minima) const {
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

ONNXTensorElementDataType BlockMatMul::input_type(std::size_t input) {
  return input == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type_of_block_part(input - 1);
}

void multiply(const Kernels& kernels, const BlockMatrix& matrix, const Product& product) {
  if (product.rows() == 0) return;
  const RoundedRows rows(kernels, matrix, product.x(), product.rows());
  product.prepare([&](std::int64_t first, int count) { rows.round(first, count); });
  product.multiply([&](std::int64_t group, std::int64_t first, int count, float* y, std::int64_t stride) {
    kernels.block_tile(matrix, group, rows.tile(first), count, y, stride);
  });
}

void BlockMatMul::run(const Ort::KernelContext& context) const {
  const BlockMatrix matrix = weights_.matrix(context);
  multiply(kernels_, matrix, Product(context, matrix.blocks * matrix.size, weights_.rows()));
}

ONNXTensorElementDataType BlockGather::input_type(std::size_t input) {
  return input == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type_of_block_part(input - 1);
}

void BlockGather::run(const Ort::KernelContext& context) const {
  const BlockMatrix matrix = weights_.matrix(context);
  gather(context, matrix.blocks * matrix.size, weights_.rows(),
         [&](std::int64_t row, float* y) { kernels_.block_row(matrix, row, y); });
}

}  // namespace dynexport::cpu
