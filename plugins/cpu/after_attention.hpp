// BlockAfterAttention, HalfAfterAttention: what follows attention in a layer, in one call.
#pragma once

#include "rows.hpp"
#include "team.hpp"

namespace dynexport::cpu {

// s = residual + attention O^T, n = RMSNormalization(s), y = s + (silu(n G^T) * n U^T) D^T.
template <class Weights>
class AfterAttention : public Computed<AfterAttention<Weights>> {
  static constexpr std::size_t kFirst = 3;

 public:
  static constexpr const char* kName = Weights::kAfterAttention;
  static constexpr std::size_t kInputs = kFirst + 4 * Weights::kParts;
  static ONNXTensorElementDataType input_type(std::size_t input) {
    return input < kFirst ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                          : Weights::part_type((input - kFirst) % Weights::kParts);
  }

  explicit AfterAttention(const Ort::ConstKernelInfo& info)
      : kernels_(needed_kernels()),
        epsilon_(info.GetAttribute<float>("epsilon")),
        hidden_(rows_of_matrix(info, "hidden")),
        inner_(rows_of_matrix(info, "inner")),
        o_(info, kFirst, hidden_, "o_"),
        gate_(info, kFirst + Weights::kParts, inner_, "gate_"),
        up_(info, kFirst + 2 * Weights::kParts, inner_, "up_"),
        down_(info, kFirst + 3 * Weights::kParts, hidden_, "down_") {}

  void run(const Ort::KernelContext& context) const {
    const auto o = o_.matrix(context), gate = gate_.matrix(context), up = up_.matrix(context);
    const auto down = down_.matrix(context);
    if (gate.columns() != hidden_ || down.columns() != inner_ || !Weights::alike(gate, up))
      refuse("gate, up, down", "matrices of fitting sizes, and blocks of gate and up that are alike", "others");
    const Activated attention = activated(context, 0, "attention", o.columns());
    const Activated residual = activated(context, 1, "residual", hidden_);
    const float* const norm = norm_weights(context, 2, hidden_);
    if (attention.rows != residual.rows)
      refuse("attention", std::to_string(residual.rows) + " rows", std::to_string(attention.rows));
    float* const y = output_like(context, residual, hidden_);
    const std::int64_t rows = residual.rows;
    if (rows == 0) return;

    using Prepared = typename Weights::Prepared;
    Scratch memory(static_cast<std::size_t>(rows * (hidden_ + inner_)) * sizeof(float) + Prepared::bytes(o, rows) +
                   Prepared::bytes(gate, rows) + Prepared::bytes(down, rows));
    const Call call{
        attention.data, residual.data, norm, y, memory.take<float>(rows * hidden_), memory.take<float>(rows * inner_)};
    const Prepared of_o(kernels_, o, memory, rows), of_gate(kernels_, gate, memory, rows);
    const Prepared of_down(kernels_, down, memory, rows);
    const std::int64_t operations = rows * hidden_ * (o.columns() + 3 * inner_);
    by_rows(context, rows, operations, [&](Team& team, Rows part) {
      project(team, part, call, o, of_o);
      norm_and_gate(team, part, call, gate, up, of_gate);
      add_down(team, part, call, down, of_down);
    });
  }

 private:
  using Matrix = typename Weights::Matrix;
  using Prepared = typename Weights::Prepared;
  struct Call {
    const float *attention, *residual, *norm;
    float *y, *normed, *inner;
  };

  // y = residual + attention O^T
  void project(Team& team, Rows part, const Call& call, const Matrix& o, const Prepared& prepared) const {
    const std::int64_t columns = o.columns();
    team.share_tiles(
        part, [&](std::int64_t first, int count) { prepared.prepare(call.attention + first * columns, first, count); });
    add_product(team, part, call, call.residual, o, prepared);
  }

  // inner = silu(n G^T) * n U^T, for n = norm(y)
  void norm_and_gate(Team& team, Rows part, const Call& call, const Matrix& gate, const Matrix& up,
                     const Prepared& prepared) const {
    team.share_tiles(part, [&](std::int64_t first, int count) {
      for (std::int64_t r = first; r < first + count; ++r)
        kernels_.norm(call.y + r * hidden_, call.norm, epsilon_, hidden_, call.normed + r * hidden_);
      prepared.prepare(call.normed + first * hidden_, first, count);
    });
    team.share_groups(part, 2 * hidden_, inner_, [&](std::int64_t group, std::int64_t first, int count) {
      float of_up[kMostRows * kLanes];
      prepared.multiply(up, group, first, count, of_up, kLanes);
      const auto multiply = [&](float* to, std::int64_t stride) {
        prepared.multiply(gate, group, first, count, to, stride);
      };
      for_group(call.inner + first * inner_, inner_, group, count, multiply,
                [&](int r, const float* tile, float* to, int width) {
                  float gated[kLanes];
                  kernels_.gate(tile, of_up + r * kLanes, gated);
                  std::memcpy(to, gated, static_cast<std::size_t>(width) * sizeof(float));
                });
    });
  }

  // y += inner D^T
  void add_down(Team& team, Rows part, const Call& call, const Matrix& down, const Prepared& prepared) const {
    team.share_tiles(
        part, [&](std::int64_t first, int count) { prepared.prepare(call.inner + first * inner_, first, count); });
    add_product(team, part, call, call.y, down, prepared);
  }

  // y = base + x W^T
  void add_product(Team& team, Rows part, const Call& call, const float* base, const Matrix& matrix,
                   const Prepared& prepared) const {
    team.share_groups(part, matrix.columns(), hidden_, [&](std::int64_t group, std::int64_t first, int count) {
      const auto multiply = [&](float* to, std::int64_t stride) {
        prepared.multiply(matrix, group, first, count, to, stride);
      };
      for_group(call.y + first * hidden_, hidden_, group, count, multiply,
                [&](int, const float* tile, float* to, int width) {
                  const float* const from = base + (to - call.y);
                  for (int i = 0; i < width; ++i) to[i] = from[i] + tile[i];
                });
    });
  }

  const Kernels& kernels_;
  float epsilon_;
  std::int64_t hidden_, inner_;
  Weights o_, gate_, up_, down_;
};

}  // namespace dynexport::cpu
