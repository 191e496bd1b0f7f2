// The operators of routed layers. They are small: what they save is the time between operators.
#include "route_operators.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dynexport::cpu {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInteger = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr auto kBool = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;

// Hidden states [B, S, H].
struct Tokens {
  std::int64_t rows, length, features;
  const float* data;

  std::int64_t count() const { return rows * length; }
};

Tokens tokens_of(const Ort::KernelContext& context) {
  const Tensor x = tensor_of(context.GetInput(0));
  if (x.shape.size() != 3) refuse("x", "float32 [B, S, H]", text_of(x.shape));
  return {x.shape[0], x.shape[1], x.shape[2], static_cast<const float*>(x.data)};
}

// An input of a known shape.
const void* shaped(const Ort::KernelContext& context, std::size_t input, const char* name, const Shape& expected) {
  const Tensor found = tensor_of(context.GetInput(input));
  if (found.shape != expected) refuse(name, text_of(expected), text_of(found.shape));
  return found.data;
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

float dot(const float* a, const float* b, std::int64_t count) {
  // Sixteen sums, so that the compiler may use vectors.
  constexpr int kSums = 16;
  float sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  for (int j = 0; i < count; ++i, ++j) sums[j] += a[i] * b[i];
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace

ONNXTensorElementDataType RouteTokens::input_type(std::size_t input) { return input == 5 ? kInteger : kFloat; }

ONNXTensorElementDataType RouteTokens::output_type(std::size_t output) { return output == 0 ? kFloat : kBool; }

void RouteTokens::run(const Ort::KernelContext& context) const {
  const Tokens x = tokens_of(context);
  const Shape of_tokens{1, x.rows, x.length};
  const auto* const weight = static_cast<const float*>(shaped(context, 1, "weight", {1, x.features}));
  const float bias = *static_cast<const float*>(shaped(context, 2, "bias", {1}));
  const float threshold = *static_cast<const float*>(shaped(context, 3, "threshold", {}));
  const auto* const told = static_cast<const float*>(shaped(context, 4, "told", of_tokens));
  const auto* const room = static_cast<const std::int64_t*>(shaped(context, 5, "room", {1, x.rows, 1}));
  auto* const scores = context.GetOutput(0, {x.rows, x.length, 1}).GetTensorMutableData<float>();
  auto* const wanted = context.GetOutput(1, of_tokens).GetTensorMutableData<bool>();
  auto* const chosen = context.GetOutput(2, of_tokens).GetTensorMutableData<bool>();
  auto* const any = context.GetOutput(3, Shape{}).GetTensorMutableData<bool>();
  for_each(context, x.count(), x.count() * x.features, [&](std::int64_t i) {
    scores[i] = dot(x.data + i * x.features, weight, x.features) + bias;
    const float compared = sigmoid(scores[i]) + told[i];
    wanted[i] = inclusive_ ? compared >= threshold : compared > threshold;
  });
  *any = false;
  for (std::int64_t row = 0; row < x.rows; ++row) {
    std::int64_t rank = 0;
    for (std::int64_t i = row * x.length; i < (row + 1) * x.length; ++i) {
      rank += wanted[i] ? 1 : 0;
      chosen[i] = wanted[i] && rank <= room[row];
      *any = *any || chosen[i];
    }
  }
}

ONNXTensorElementDataType GatherTokens::input_type(std::size_t input) { return input == 0 ? kFloat : kBool; }

ONNXTensorElementDataType GatherTokens::output_type(std::size_t output) { return output == 0 ? kFloat : kInteger; }

void GatherTokens::run(const Ort::KernelContext& context) const {
  const Tokens x = tokens_of(context);
  const auto* const chosen = static_cast<const bool*>(shaped(context, 1, "chosen", {1, x.rows, x.length}));
  const std::int64_t count = x.count() == 0 ? 0 : std::count(chosen, chosen + x.count(), true);
  auto* const line = context.GetOutput(0, {count, x.features}).GetTensorMutableData<float>();
  auto* const places = context.GetOutput(1, {count, 2}).GetTensorMutableData<std::int64_t>();
  std::int64_t n = 0;
  for (std::int64_t row = 0; row < x.rows; ++row)
    for (std::int64_t token = 0; token < x.length; ++token) {
      if (!chosen[row * x.length + token]) continue;
      places[n * 2] = row;
      places[n * 2 + 1] = token;
      ++n;
    }
  for_each(context, count, count * x.features, [&](std::int64_t i) {
    const std::int64_t from = places[i * 2] * x.length + places[i * 2 + 1];
    std::memcpy(line + i * x.features, x.data + from * x.features,
                static_cast<std::size_t>(x.features) * sizeof(float));
  });
}

ONNXTensorElementDataType ScatterGated::input_type(std::size_t input) { return input == 3 ? kInteger : kFloat; }

void ScatterGated::run(const Ort::KernelContext& context) const {
  const Tokens x = tokens_of(context);
  const Shape of_line = tensor_of(context.GetInput(1)).shape;
  const std::int64_t count = of_line.empty() ? 0 : of_line[0];
  const auto* const y = static_cast<const float*>(shaped(context, 1, "y", {count, x.features}));
  const auto* const scores = static_cast<const float*>(shaped(context, 2, "score", {x.rows, x.length, 1}));
  const auto* const places = static_cast<const std::int64_t*>(shaped(context, 3, "places", {count, 2}));
  auto* const output = context.GetOutput(0, {x.rows, x.length, x.features}).GetTensorMutableData<float>();
  if (x.count() * x.features > 0)
    std::memcpy(output, x.data, static_cast<std::size_t>(x.count() * x.features) * sizeof(float));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = places[i * 2], token = places[i * 2 + 1];
    if (row < 0 || row >= x.rows || token < 0 || token >= x.length)
      refuse("places", "of " + text_of({x.rows, x.length}), text_of({row, token}));
  }
  for_each(context, count, count * x.features, [&](std::int64_t i) {
    const std::int64_t place = places[i * 2] * x.length + places[i * 2 + 1];
    const float gate = sigmoid_ ? sigmoid(scores[place]) : scores[place];
    const float* const after = y + i * x.features;
    float* const to = output + place * x.features;
    for (std::int64_t j = 0; j < x.features; ++j) to[j] += gate * (after[j] - to[j]);
  });
}

}  // namespace dynexport::cpu
