// BlockMatMul and BlockGather: products with, and rows of, a matrix in blocks of integers.
#pragma once

#include <memory>
#include <optional>

#include "on_matrix.hpp"
#include "rows.hpp"

namespace dynexport::cpu {

// The form of a node's matrix: the attributes N, bits and zero.
class BlockForm {
 public:
  explicit BlockForm(const Ort::ConstKernelInfo& info);

  BlockMatrix checked(const Tensor& quantized, const Tensor& scales, const Tensor& minima) const;
  std::int64_t rows() const { return rows_; }

 private:
  std::int64_t rows_;
  int bits_, zero_;
};

// The matrix of a node: its form, and inputs 1 to 3.
class BlockWeights {
 public:
  explicit BlockWeights(const Ort::ConstKernelInfo& info);

  BlockMatrix matrix(const Ort::KernelContext& context) const;
  std::int64_t rows() const { return form_.rows(); }

 private:
  BlockForm form_;
  std::optional<BlockMatrix> constant_;
};

void multiply(const Kernels& kernels, const BlockMatrix& matrix, const Product& product);
ONNXTensorElementDataType type_of_block_part(std::size_t part);

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
