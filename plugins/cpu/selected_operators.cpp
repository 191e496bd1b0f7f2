// Products and norms with the weights of chosen layers.
#include "selected_operators.hpp"

#include <algorithm>
#include <array>

#include "matmul.hpp"

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

// Calls of_rows(layer, first row, rows) for neighbours that chose the same layer.
template <class Function>
void for_layers(const Ort::KernelContext& context, const Activated& x, std::int64_t layers, std::int64_t results,
                float* y, const Function& of_rows) {
  const Index index(context, 1, x.rows, layers);
  for (std::int64_t first = 0; first < x.rows;) {
    std::int64_t end = first + 1;
    while (end < x.rows && index[end] == index[first]) ++end;
    if (index[first] < 0)
      std::fill_n(y + first * results, (end - first) * results, 0.0F);
    else
      of_rows(index[first], first, end - first);
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

template <class Weights>
ONNXTensorElementDataType SelectedMatMul<Weights>::input_type(std::size_t input) {
  return input < 2 ? type_of_rows(input) : Weights::part_type(input - 2);
}

template <class Weights>
void SelectedMatMul<Weights>::run(const Ort::KernelContext& context) const {
  std::array<Tensor, Weights::kParts> stacks;
  for (std::size_t part = 0; part < stacks.size(); ++part) stacks[part] = tensor_of(context.GetInput(2 + part));
  const std::int64_t layers = layers_of(stacks[0]);
  for (const Tensor& stack : stacks) check_stack(stack, "weights", stack.shape.size(), layers);
  const auto matrix = [&](std::int64_t layer) {
    const auto part = [&](std::size_t i) { return of_layer(stacks[i], layer, size_of(stacks[i].type)); };
    if constexpr (Weights::kParts == 1)
      return weights_.checked(part(0));
    else
      return weights_.checked(part(0), part(1), part(2));
  };
  const std::int64_t columns = matrix(0).columns(), results = weights_.rows();
  const Activated x = activated(context, 0, "x", columns);
  float* const y = output_like(context, x, results);
  for_layers(context, x, layers, results, y, [&](std::int64_t layer, std::int64_t row, std::int64_t rows) {
    const auto chosen = matrix(layer);
    const std::int64_t together = std::min(rows, kMostTogether);
    Scratch memory(Weights::Prepared::bytes(chosen, together));
    const typename Weights::Prepared prepared(kernels_, chosen, memory, together);
    multiply(context, chosen, prepared, rows, results, y + row * results,
             [&](std::int64_t begin, std::int64_t first, int) { return x.data + (row + begin + first) * columns; });
  });
}

template class SelectedMatMul<BlockWeights>;
template class SelectedMatMul<HalfWeights>;

ONNXTensorElementDataType SelectedFloatMatMul::input_type(std::size_t input) {
  return input == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type_of_rows(input);
}

void SelectedFloatMatMul::run(const Ort::KernelContext& context) const {
  const Tensor weights = tensor_of(context.GetInput(2));
  const std::int64_t layers = layers_of(weights);
  check_stack(weights, "weights", 3, layers);
  const std::int64_t results = weights.shape[1], columns = weights.shape[2];
  const Activated x = activated(context, 0, "x", columns);
  float* const y = output_like(context, x, results);
  for_layers(context, x, layers, results, y, [&](std::int64_t layer, std::int64_t begin, std::int64_t rows) {
    const float* const matrix = static_cast<const float*>(weights.data) + layer * results * columns;
    for_each(context, (results + kLanes - 1) / kLanes, rows * results * columns, [&](std::int64_t group) {
      const std::int64_t first = group * kLanes;
      const int width = static_cast<int>(std::min<std::int64_t>(kLanes, results - first));
      for (std::int64_t row = begin; row < begin + rows; ++row)
        kernels_.float_rows(matrix + first * columns, columns, width, x.data + row * columns,
                            y + row * results + first);
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
    for (std::int64_t i = 0; i < together; ++i, from += size, y += size) kernels_.norm(from, weight, small, size, y);
  }
}

template class SelectedRmsNorm<false>;
template class SelectedRmsNorm<true>;

}  // namespace dynexport::cpu
