// BlockAfterAttention, HalfAfterAttention: what follows attention in a layer, in one part.
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

    using Prepared = typename Weights::Prepared;
    const std::int64_t together = std::min(residual.rows, kMostTogether);
    Scratch memory(static_cast<std::size_t>(together * (hidden_ + inner_)) * sizeof(float) +
                   Prepared::bytes(o, together) + Prepared::bytes(gate, together) + Prepared::bytes(down, together));
    float* const normed = memory.take<float>(together * hidden_);
    float* const inner = memory.take<float>(together * inner_);
    const Prepared of_o(kernels_, o, memory, together), of_gate(kernels_, gate, memory, together);
    const Prepared of_down(kernels_, down, memory, together);
    const std::int64_t operations = hidden_ * (o.columns() + 3 * inner_);
    by_parts(context, residual.rows, operations, [&](Team& team, std::int64_t first, std::int64_t rows) {
      const Part part{rows,
                      attention.data + first * o.columns(),
                      residual.data + first * hidden_,
                      norm,
                      y + first * hidden_,
                      normed,
                      inner};
      project(team, part, o, of_o);
      norm_and_gate(team, part, gate, up, of_gate);
      add_down(team, part, down, of_down);
    });
  }

 private:
  using Matrix = typename Weights::Matrix;
  using Prepared = typename Weights::Prepared;
  // Some rows of a part.
  struct Part {
    std::int64_t rows;
    const float *attention, *residual, *norm;
    float *y, *normed, *inner;
  };

  // y = residual + attention O^T
  void project(Team& team, const Part& part, const Matrix& o, const Prepared& prepared) const {
    const std::int64_t columns = o.columns();
    team.share_tiles(part.rows, [&](std::int64_t first, int count) {
      prepared.prepare(part.attention + first * columns, first, count);
    });
    add_product(team, part, part.residual, o, prepared);
  }

  // inner = silu(n G^T) * n U^T, for n = norm(y)
  void norm_and_gate(Team& team, const Part& part, const Matrix& gate, const Matrix& up,
                     const Prepared& prepared) const {
    team.share_tiles(part.rows, [&](std::int64_t first, int count) {
      for (std::int64_t r = first; r < first + count; ++r)
        kernels_.norm(part.y + r * hidden_, part.norm, epsilon_, hidden_, part.normed + r * hidden_);
      prepared.prepare(part.normed + first * hidden_, first, count);
    });
    team.share_groups(part.rows, 2 * hidden_, inner_, [&](std::int64_t group, std::int64_t first, int count) {
      float of_up[kMostRows * kLanes];
      prepared.multiply(up, group, first, count, of_up, kLanes);
      const auto multiply = [&](float* to, std::int64_t stride) {
        prepared.multiply(gate, group, first, count, to, stride);
      };
      for_group(part.inner + first * inner_, inner_, group, count, multiply,
                [&](int r, const float* tile, float* to, int width) {
                  float gated[kLanes];
                  kernels_.gate(tile, of_up + r * kLanes, gated);
                  std::memcpy(to, gated, static_cast<std::size_t>(width) * sizeof(float));
                });
    });
  }

  // y += inner D^T
  void add_down(Team& team, const Part& part, const Matrix& down, const Prepared& prepared) const {
    team.share_tiles(
        part.rows, [&](std::int64_t first, int count) { prepared.prepare(part.inner + first * inner_, first, count); });
    add_product(team, part, part.y, down, prepared);
  }

  // y = base + x W^T
  void add_product(Team& team, const Part& part, const float* base, const Matrix& matrix,
                   const Prepared& prepared) const {
    team.share_groups(part.rows, matrix.columns(), hidden_, [&](std::int64_t group, std::int64_t first, int count) {
      const auto multiply = [&](float* to, std::int64_t stride) {
        prepared.multiply(matrix, group, first, count, to, stride);
      };
      for_group(part.y + first * hidden_, hidden_, group, count, multiply,
                [&](int, const float* tile, float* to, int width) {
                  const float* const from = base + (to - part.y);
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
