// ChooseLayer.
#include "layer_choice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dynexport::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kMost = std::int64_t{1} << 31;

const float* floats(const Tensor& tensor, const char* name, const Shape& shape) {
  if (tensor.shape != shape) refuse(name, "float32 " + text_of(shape), text_of(tensor.shape));
  return static_cast<const float*>(tensor.data);
}

}  // namespace

// The router's weights, and its scores.
struct ChooseLayer::Router {
  const Ort::KernelContext& context;
  const Kernels& kernels;
  std::int64_t hidden, units, choices;
  const float *norm, *fc1, *bias1, *fc2, *bias2;
  float epsilon;

  Router(const Ort::KernelContext& given, const Kernels& chosen) : context(given), kernels(chosen) {
    const Tensor first = tensor_of(context.GetInput(3)), second = tensor_of(context.GetInput(5));
    if (first.shape.size() != 2 || second.shape.size() != 2 || second.shape[1] != first.shape[0] ||
        first.data == nullptr || second.data == nullptr)
      refuse("fc2", "[choices, units] for fc1 [units, hidden]", text_of(second.shape) + " for " + text_of(first.shape));
    units = first.shape[0];
    hidden = first.shape[1];
    choices = second.shape[0];
    fc1 = static_cast<const float*>(first.data);
    fc2 = static_cast<const float*>(second.data);
    norm = floats(tensor_of(context.GetInput(1)), "norm", {hidden});
    const Tensor small = tensor_of(context.GetInput(2));
    if (small.data == nullptr) refuse("epsilon", "one number", text_of(small.shape));
    epsilon = *static_cast<const float*>(small.data);
    bias1 = floats(tensor_of(context.GetInput(4)), "bias of fc1", {units});
    bias2 = floats(tensor_of(context.GetInput(6)), "bias of fc2", {choices});
  }

  // fc2(silu(fc1(norm(x)))); ``memory`` holds hidden + units values.
  void score(const float* x, float* memory, float* scores) const {
    float *const normed = memory, *const inner = memory + hidden;
    kernels.norm(x, norm, epsilon, hidden, normed);
    multiply(fc1, hidden, units, normed, inner);
    for (std::int64_t i = 0; i < units; ++i) {
      inner[i] += bias1[i];
      inner[i] /= 1 + std::exp(-inner[i]);
    }
    multiply(fc2, units, choices, inner, scores);
    for (std::int64_t i = 0; i < choices; ++i) scores[i] += bias2[i];
  }

 private:
  void multiply(const float* w, std::int64_t columns, std::int64_t rows, const float* x, float* y) const {
    for_each(context, (rows + kLanes - 1) / kLanes, rows * columns, [&](std::int64_t group) {
      const std::int64_t first = group * kLanes;
      const int count = static_cast<int>(std::min<std::int64_t>(kLanes, rows - first));
      kernels.float_rows(w + first * columns, columns, count, x, y + first);
    });
  }
};

// Of one row; ``layer`` is -1 where the row has no choice.
struct ChooseLayer::Choice {
  std::int64_t layer = -1;
  float score = 0, margin = kInfinity, gate = 0;
};

ChooseLayer::ChooseLayer(const Ort::ConstKernelInfo& info)
    : kernels_(needed_kernels()),
      hop_(attribute(info, "hop", 0, kMost)),
      layers_(attribute(info, "layers", 1, kMost)),
      exits_(attribute(info, "exits", 0, 1) == 1),
      reuses_(attribute(info, "reuses", 0, 1) == 1) {}

ONNXTensorElementDataType ChooseLayer::input_type(std::size_t input) {
  if (input == 9) return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  return input >= 7 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

ONNXTensorElementDataType ChooseLayer::output_type(std::size_t output) {
  if (output == 0 || output == 3) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  return output <= 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

ChooseLayer::Choice ChooseLayer::choose(const float* scores, std::int64_t choices, const bool* seen,
                                        std::int64_t forced) const {
  const auto allowed = [&](std::int64_t i) { return i < layers_ ? !seen[i] : exits_; };
  std::int64_t best = -1;
  float first = -kInfinity, second = -kInfinity;
  bool finite = true;
  for (std::int64_t i = 0; i < choices; ++i) {
    finite = finite && std::isfinite(scores[i]);
    if (!allowed(i)) continue;
    if (best < 0 || scores[i] > first) {
      second = best < 0 ? second : first;
      best = i;
      first = scores[i];
    } else if (scores[i] > second) {
      second = scores[i];
    }
  }
  if (best < 0) return {};
  if (forced >= choices) refuse("forced", "at most " + std::to_string(choices - 1), std::to_string(forced));
  const std::int64_t layer = forced < 0 ? best : forced;
  float sum = 0;
  for (std::int64_t i = 0; i < choices; ++i) sum += allowed(i) ? std::exp(scores[i] - first) : 0;
  // A score that is not finite must not go unnoticed because another layer was chosen.
  return {layer, finite ? scores[layer] : std::numeric_limits<float>::quiet_NaN(), first - second,
          allowed(layer) ? std::exp(scores[layer] - first) / sum : 0};
}

void ChooseLayer::run(const Ort::KernelContext& context) const {
  const Router router(context, kernels_);
  const Tensor x = tensor_of(context.GetInput(0)), forced = tensor_of(context.GetInput(7)),
               before = tensor_of(context.GetInput(8)), seen = tensor_of(context.GetInput(9));
  const std::int64_t rows = x.shape.empty() ? 0 : x.shape[0], choices = router.choices;
  floats(x, "x", {rows, 1, router.hidden});
  if (choices != layers_ && choices != layers_ + 1)
    refuse("fc2", "scores of " + std::to_string(layers_) + " layers, and of an exit or not", std::to_string(choices));
  if (forced.shape.size() != 3 || forced.shape[0] <= hop_ || forced.shape[1] != rows || forced.shape[2] != 1)
    refuse("forced", "[more than " + std::to_string(hop_) + ", " + std::to_string(rows) + ", 1]",
           text_of(forced.shape));
  if (before.shape != Shape{rows}) refuse("before", text_of({rows}), text_of(before.shape));
  if (seen.shape != Shape{rows, choices}) refuse("seen", text_of({rows, choices}), text_of(seen.shape));

  const Shape of_path{1, rows, 1};
  auto* const index = context.GetOutput(0, {rows}).GetTensorMutableData<std::int64_t>();
  bool* const any = context.GetOutput(1, Shape{}).GetTensorMutableData<bool>();
  bool* const seen_now = context.GetOutput(2, seen.shape).GetTensorMutableData<bool>();
  auto* const path = context.GetOutput(3, of_path).GetTensorMutableData<std::int64_t>();
  float* const score = context.GetOutput(4, of_path).GetTensorMutableData<float>();
  float* const margin = context.GetOutput(5, of_path).GetTensorMutableData<float>();
  float* const gate = context.GetOutput(6, {rows}).GetTensorMutableData<float>();

  Scratch memory(static_cast<std::size_t>(router.hidden + router.units + choices) * sizeof(float));
  float* const inside = memory.take<float>(router.hidden + router.units);
  float* const scores = memory.take<float>(choices);
  *any = false;
  for (std::int64_t row = 0; row < rows; ++row) {
    const bool* const known = static_cast<const bool*>(seen.data) + row * choices;
    bool* const now = seen_now + row * choices;
    Choice choice;
    if (static_cast<const std::int64_t*>(before.data)[row] >= 0) {
      router.score(static_cast<const float*>(x.data) + row * router.hidden, inside, scores);
      choice = choose(scores, choices, known, static_cast<const std::int64_t*>(forced.data)[hop_ * rows + row]);
    }
    std::copy_n(known, choices, now);
    if (!reuses_ && choice.layer >= 0 && choice.layer < layers_) now[choice.layer] = true;
    index[row] = choice.layer < layers_ ? choice.layer : -1;
    *any = *any || index[row] >= 0;
    path[row] = choice.layer;
    score[row] = choice.score;
    margin[row] = choice.margin;
    gate[row] = choice.gate;
  }
}

}  // namespace dynexport::cpu
