// HalfMatMul and HalfGather: products with, and rows of, a matrix of 16-bit floats.
#pragma once

#include <optional>

#include "on_matrix.hpp"

namespace dynexport::cpu {

// The matrix of a node: input 1, and the attribute N.
class HalfWeights {
 public:
  explicit HalfWeights(const Ort::ConstKernelInfo& info);

  HalfMatrix matrix(const Ort::KernelContext& context) const;
  std::int64_t rows() const { return rows_; }

 private:
  HalfMatrix checked(const Tensor& weights) const;

  std::int64_t rows_;
  std::optional<HalfMatrix> constant_;
};

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
