// BlockMatMul, HalfMatMul: products with a matrix; BlockNormMatMul, HalfNormMatMul: of rows that are normed before.
#pragma once

#include "rows.hpp"
#include "team.hpp"

namespace dynexport::cpu {

// y = x W^T for rows of x that rows_of(first row of a part, row in the part, rows) gives for each tile.
template <class Matrix, class Prepared, class RowsOf>
void multiply(const Ort::KernelContext& context, const Matrix& matrix, const Prepared& prepared, std::int64_t rows_of_x,
              std::int64_t results, float* y, const RowsOf& rows_of) {
  const std::int64_t columns = matrix.columns();
  by_parts(context, rows_of_x, columns * results, [&](Team& team, std::int64_t begin, std::int64_t rows) {
    team.share_tiles(
        rows, [&](std::int64_t first, int count) { prepared.prepare(rows_of(begin, first, count), first, count); });
    team.share_groups(rows, columns, results, [&](std::int64_t group, std::int64_t first, int count) {
      const auto of_group = [&](float* to, std::int64_t stride) {
        prepared.multiply(matrix, group, first, count, to, stride);
      };
      float* const to = y + (begin + first) * results;
      if ((group + 1) * kLanes <= results) {
        of_group(to + group * kLanes, results);
        return;
      }
      for_group(to, results, group, count, of_group, [](int, const float* tile, float* row, int width) {
        std::memcpy(row, tile, static_cast<std::size_t>(width) * sizeof(float));
      });
    });
  });
}

// y = x W^T; where ``kNormed``, of x that RMSNormalization has normed. ``Weights`` reads W from the node.
template <class Weights, bool kNormed>
class MatMul : public Computed<MatMul<Weights, kNormed>> {
  static constexpr std::size_t kFirst = kNormed ? 2 : 1;

 public:
  static constexpr const char* kName = kNormed ? Weights::kNormMatMul : Weights::kMatMul;
  static constexpr std::size_t kInputs = kFirst + Weights::kParts;
  static ONNXTensorElementDataType input_type(std::size_t input) {
    return input < kFirst ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : Weights::part_type(input - kFirst);
  }

  explicit MatMul(const Ort::ConstKernelInfo& info)
      : kernels_(needed_kernels()), weights_(info, kFirst, rows_of_matrix(info)) {
    if constexpr (kNormed) epsilon_ = info.GetAttribute<float>("epsilon");
  }

  void run(const Ort::KernelContext& context) const {
    const auto matrix = weights_.matrix(context);
    const std::int64_t columns = matrix.columns(), results = weights_.rows();
    const Activated x = activated(context, 0, "x", columns);
    const float* const norm = kNormed ? norm_weights(context, 1, columns) : nullptr;
    float* const y = output_like(context, x, results);
    const std::int64_t together = std::min(x.rows, kMostTogether);
    Scratch memory(Weights::Prepared::bytes(matrix, together) + normed_bytes(together * columns));
    float* const normed = kNormed ? memory.take<float>(together * columns) : nullptr;
    const typename Weights::Prepared prepared(kernels_, matrix, memory, together);
    const auto rows_of = [&](std::int64_t begin, std::int64_t first, int count) {
      const float* const of_tile = x.data + (begin + first) * columns;
      if constexpr (kNormed) return normed_rows(of_tile, norm, columns, count, normed + first * columns);
      return of_tile;
    };
    multiply(context, matrix, prepared, x.rows, results, y, rows_of);
  }

 private:
  static std::size_t normed_bytes(std::int64_t values) {
    return kNormed ? static_cast<std::size_t>(values) * sizeof(float) : 0;
  }
  const float* normed_rows(const float* x, const float* norm, std::int64_t columns, int count, float* to) const {
    for (int r = 0; r < count; ++r) kernels_.norm(x + r * columns, norm, epsilon_, columns, to + r * columns);
    return to;
  }

  const Kernels& kernels_;
  Weights weights_;
  float epsilon_ = 0;
};

}  // namespace dynexport::cpu
