// BlockMatMul and BlockGather: products with, and rows of, a matrix in blocks of integers.
#pragma once

#include <memory>
#include <optional>

#include "on_matrix.hpp"

namespace dynexport::cpu {

// The matrix of a node: inputs 1 to 3, and the attributes N, bits and zero.
class BlockWeights {
 public:
  explicit BlockWeights(const Ort::ConstKernelInfo& info);

  BlockMatrix matrix(const Ort::KernelContext& context) const;
  std::int64_t rows() const { return rows_; }

 private:
  BlockMatrix checked(const Tensor& quantized, const Tensor& scales, const Tensor& minima) const;

  std::int64_t rows_;
  int bits_, zero_;
  std::optional<BlockMatrix> constant_;
};

class BlockMatMul : public OnMatrix<BlockMatMul, BlockWeights> {
 public:
  using OnMatrix::OnMatrix;

  static constexpr const char* kName = "BlockMatMul";
  static constexpr std::size_t kInputs = 4;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;
};

class BlockGather : public OnMatrix<BlockGather, BlockWeights> {
 public:
  using OnMatrix::OnMatrix;

  static constexpr const char* kName = "BlockGather";
  static constexpr std::size_t kInputs = 4;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;
};

}  // namespace dynexport::cpu
