// A matrix of 16-bit floats as the input of a node, and rows of activations in the form that it is multiplied with.
#pragma once

#include <optional>

#include "context.hpp"
#include "kernels.hpp"

namespace dynexport::cpu {

// Rows of activations, in the order or the type that the kernels read.
class HalfRows {
 public:
  static std::size_t bytes(const HalfMatrix& matrix, std::int64_t rows);
  HalfRows(const Kernels& kernels, const HalfMatrix& matrix, Scratch& memory, std::int64_t rows);

  // As of BlockRows.
  void prepare(const float* x, std::int64_t first, int rows) const;
  void multiply(const HalfMatrix& matrix, std::int64_t group, std::int64_t first, int rows, float* y,
                std::int64_t stride) const;

 private:
  const HalfKernels& kernels_;
  HalfMatrix matrix_;
  float* all_;
};

class HalfWeights {
 public:
  using Matrix = HalfMatrix;
  using Prepared = HalfRows;
  static constexpr const char *kMatMul = "HalfMatMul", *kSelected = "SelectedHalfMatMul", *kGather = "HalfGather",
                              *kNormMatMul = "HalfNormMatMul", *kAfterAttention = "HalfAfterAttention";
  static constexpr std::size_t kParts = 1;

  // The matrix of N = ``rows`` in the input ``first``.
  HalfWeights(const Ort::ConstKernelInfo& info, std::size_t first, std::int64_t rows, const std::string& prefix = "",
              bool stacked = false);

  HalfMatrix matrix(const Ort::KernelContext& context) const;
  // That of one layer, from its parts of the inputs.
  HalfMatrix checked(const Tensor& weights) const;
  std::int64_t rows() const { return rows_; }
  static ONNXTensorElementDataType part_type(std::size_t part);
  static bool alike(const HalfMatrix& a, const HalfMatrix& b) {
    return a.columns() == b.columns() && a.bfloat16 == b.bfloat16;
  }

 private:
  std::size_t first_;
  std::int64_t rows_;
  std::optional<HalfMatrix> constant_;
};

}  // namespace dynexport::cpu
