// Products and norms with the weights of chosen layers.
#include "selected_operators.hpp"

#include <algorithm>
#include <cstring>

#include "norms.hpp"

namespace dynexport::cpu {
namespace {

// One layer's part of a stack.
Tensor of_layer(const Tensor& stack, std::int64_t layer, std::size_t element) {
  const Shape shape(stack.shape.begin() + 1, stack.shape.end());
  const std::int64_t bytes = product(shape, 0, shape.size()) * static_cast<std::int64_t>(element);
  return {stack.type, shape, static_cast<const char*>(stack.data) + layer * bytes};
}

std::size_t size_of(ONNXTensorElementDataType type) {
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) return 1;
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
}

// The layers of all rows.
class Index {
 public:
  Index(const Ort::KernelContext& context, std::size_t input, std::int64_t rows, std::int64_t layers)
      : tensor_(tensor_of(context.GetInput(input))), values_(static_cast<const std::int64_t*>(tensor_.data)) {
    if (tensor_.shape != Shape{rows}) refuse("index", text_of({rows}), text_of(tensor_.shape));
    for (std::int64_t row = 0; row < rows; ++row)
      if (values_[row] < -1 || values_[row] >= layers)
        refuse("index", "-1.." + std::to_string(layers - 1), std::to_string(values_[row]));
  }

  std::int64_t operator[](std::int64_t row) const { return values_[row]; }

 private:
  Tensor tensor_;
  const std::int64_t* values_;
};

// Calls of_rows(layer, product of some rows) for neighbours that chose the same layer.
template <class Function>
void for_layers(const Ort::KernelContext& context, const Product& product, std::int64_t layers,
                const Function& of_rows) {
  const Index index(context, 1, product.rows(), layers);
  for (std::int64_t first = 0; first < product.rows();) {
    std::int64_t end = first + 1;
    while (end < product.rows() && index[end] == index[first]) ++end;
    const Product part = product.of_rows(first, end - first);
    if (index[first] < 0)
      std::fill_n(part.y(), part.rows() * part.results(), 0.0F);
    else
      of_rows(index[first], part);
    first = end;
  }
}

void check_stack(const Tensor& stack, const char* name, std::size_t axes, std::int64_t layers) {
  if (stack.shape.size() != axes || stack.shape[0] != layers || layers < 1)
    refuse(name, std::to_string(axes) + " axes, the first of " + std::to_string(layers) + " layers",
           text_of(stack.shape));
}

ONNXTensorElementDataType type_of_rows(std::size_t input) {
  return input == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

std::int64_t layers_of(const Tensor& stack) { return stack.shape.empty() ? 0 : stack.shape[0]; }

}  // namespace

ONNXTensorElementDataType SelectedBlockMatMul::input_type(std::size_t input) {
  return input < 2 ? type_of_rows(input) : type_of_block_part(input - 2);
}

void SelectedBlockMatMul::run(const Ort::KernelContext& context) const {
  const Tensor quantized = tensor_of(context.GetInput(2)), scales = tensor_of(context.GetInput(3)),
               minima = tensor_of(context.GetInput(4));
  const std::int64_t layers = layers_of(quantized);
  check_stack(quantized, "quantized", 6, layers);
  check_stack(scales, "scales", 4, layers);
  check_stack(minima, "minima", 4, layers);
  const auto matrix = [&](std::int64_t layer) {
    return form_.checked(of_layer(quantized, layer, 1), of_layer(scales, layer, size_of(scales.type)),
                         of_layer(minima, layer, size_of(minima.type)));
  };
  const BlockMatrix any = matrix(0);
  const Product product(context, any.blocks * any.size, form_.rows());
  for_layers(context, product, layers,
             [&](std::int64_t layer, const Product& part) { multiply(kernels_, matrix(layer), part); });
}

SelectedHalfMatMul::SelectedHalfMatMul(const Ort::ConstKernelInfo& info)
    : kernels_(needed_kernels()), rows_(attribute(info, "N", 1, std::int64_t{1} << 40)) {}

ONNXTensorElementDataType SelectedHalfMatMul::input_type(std::size_t input) {
  return input < 2 ? type_of_rows(input) : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

void SelectedHalfMatMul::run(const Ort::KernelContext& context) const {
  const Tensor weights = tensor_of(context.GetInput(2));
  const std::int64_t layers = layers_of(weights);
  check_stack(weights, "weights", 5, layers);
  const auto matrix = [&](std::int64_t layer) { return half_matrix(of_layer(weights, layer, 2), rows_); };
  const Product product(context, matrix(0).columns, rows_);
  for_layers(context, product, layers,
             [&](std::int64_t layer, const Product& part) { multiply(kernels_, matrix(layer), part); });
}

ONNXTensorElementDataType SelectedFloatMatMul::input_type(std::size_t input) {
  return input == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type_of_rows(input);
}

void SelectedFloatMatMul::run(const Ort::KernelContext& context) const {
  const Tensor weights = tensor_of(context.GetInput(2));
  const std::int64_t layers = layers_of(weights);
  check_stack(weights, "weights", 3, layers);
  const std::int64_t results = weights.shape[1], columns = weights.shape[2];
  const Product product(context, columns, results);
  for_layers(context, product, layers, [&](std::int64_t layer, const Product& part) {
    const float* const matrix = static_cast<const float*>(weights.data) + layer * results * columns;
    part.multiply([&](std::int64_t group, std::int64_t first, int count, float* y, std::int64_t stride) {
      const std::int64_t row = group * kLanes;
      const int width = static_cast<int>(std::min<std::int64_t>(kLanes, results - row));
      for (int r = 0; r < count; ++r)
        kernels_.float_rows(matrix + row * columns, columns, width, part.x() + (first + r) * columns, y + r * stride);
    });
  });
}

template <bool kAdds>
ONNXTensorElementDataType SelectedRmsNorm<kAdds>::input_type(std::size_t input) {
  return input == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

// Inputs: x [rows, 1, size], index, weights [layers, size], epsilon; residual as x.
template <bool kAdds>
void SelectedRmsNorm<kAdds>::run(const Ort::KernelContext& context) const {
  const Tensor x = tensor_of(context.GetInput(0)), weights = tensor_of(context.GetInput(2)),
               epsilon = tensor_of(context.GetInput(3));
  const std::int64_t layers = layers_of(weights);
  check_stack(weights, "weights", 2, layers);
  const std::int64_t size = weights.shape[1];
  if (x.shape.size() < 2 || x.shape.back() != size || size < 1)
    refuse("x", "float32 [rows, .., " + std::to_string(size) + "]", text_of(x.shape));
  if (epsilon.data == nullptr) refuse("epsilon", "one number", text_of(epsilon.shape));
  // Several vectors of a row, such as its heads, have the same layer.
  const std::int64_t rows = x.shape[0], together = product(x.shape, 1, x.shape.size() - 1);
  const Index index(context, 1, rows, layers);
  const float* from = static_cast<const float*>(x.data);
  float* y = context.GetOutput(0, x.shape).template GetTensorMutableData<float>();
  if constexpr (kAdds) {
    const Tensor residual = tensor_of(context.GetInput(4));
    if (residual.shape != x.shape) refuse("residual", text_of(x.shape), text_of(residual.shape));
    float* const sum = context.GetOutput(1, x.shape).template GetTensorMutableData<float>();
    const float* const other = static_cast<const float*>(residual.data);
    for (std::int64_t i = 0; i < rows * together * size; ++i) sum[i] = from[i] + other[i];
    from = sum;
  }
  const float small = *static_cast<const float*>(epsilon.data);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t layer = std::max<std::int64_t>(index[row], 0);
    const float* const weight = static_cast<const float*>(weights.data) + layer * size;
    for (std::int64_t i = 0; i < together; ++i, from += size, y += size) rms_norm(from, weight, small, size, y);
  }
}

template class SelectedRmsNorm<false>;
template class SelectedRmsNorm<true>;

}  // namespace dynexport::cpu
