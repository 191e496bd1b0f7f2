// HalfMatMul and HalfGather: products with, and rows of, a matrix of 16-bit floats.
#pragma once

#include <optional>

#include "on_matrix.hpp"
#include "rows.hpp"

namespace dynexport::cpu {

// The matrix of a node: input 1, and the attribute N.
class HalfWeights {
 public:
  explicit HalfWeights(const Ort::ConstKernelInfo& info);

  HalfMatrix matrix(const Ort::KernelContext& context) const;
  std::int64_t rows() const { return rows_; }

 private:
  std::int64_t rows_;
  std::optional<HalfMatrix> constant_;
};

// A matrix [rows, K] of that many rows.
HalfMatrix half_matrix(const Tensor& weights, std::int64_t rows);
void multiply(const Kernels& kernels, const HalfMatrix& matrix, const Product& product);

class HalfMatMul : public OnMatrix<HalfMatMul, HalfWeights> {
 public:
  using OnMatrix::OnMatrix;

  static constexpr const char* kName = "HalfMatMul";
  static constexpr std::size_t kInputs = 2;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;
};

class HalfGather : public OnMatrix<HalfGather, HalfWeights> {
 public:
  using OnMatrix::OnMatrix;

  static constexpr const char* kName = "HalfGather";
  static constexpr std::size_t kInputs = 2;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;
};

}  // namespace dynexport::cpu
