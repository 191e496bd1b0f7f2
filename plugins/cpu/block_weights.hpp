// A matrix in blocks of integers as the inputs of a node, and rows of activations in the form that it is multiplied
// with.
#pragma once

#include <optional>

#include "context.hpp"
#include "kernels.hpp"

namespace dynexport::cpu {

// Rows of activations, rounded for a matrix in blocks.
class BlockRows {
 public:
  static std::size_t bytes(const BlockMatrix& matrix, std::int64_t rows);
  BlockRows(const Kernels& kernels, const BlockMatrix& matrix, Scratch& memory, std::int64_t rows);

  // Rounds one tile, x [rows, K], whose first row is ``first``.
  void prepare(const float* x, std::int64_t first, int rows) const;
  // y [rows, stride] of one tile and one group of a matrix that rounds as this one: 16 columns.
  void multiply(const BlockMatrix& matrix, std::int64_t group, std::int64_t first, int rows, float* y,
                std::int64_t stride) const;

 private:
  Activations tile(std::int64_t first) const;

  const Kernels& kernels_;
  std::int64_t blocks_, columns_;
  int size_, zero_;
  Activations all_;
};

class BlockWeights {
 public:
  using Matrix = BlockMatrix;
  using Prepared = BlockRows;
  static constexpr const char *kMatMul = "BlockMatMul", *kSelected = "SelectedBlockMatMul", *kGather = "BlockGather",
                              *kNormMatMul = "BlockNormMatMul", *kAfterAttention = "BlockAfterAttention";
  static constexpr std::size_t kParts = 3;

  // The matrix of N = ``rows`` in the inputs from ``first`` on, with the attributes ``prefix``bits and ``prefix``zero.
  BlockWeights(const Ort::ConstKernelInfo& info, std::size_t first, std::int64_t rows, const std::string& prefix = "",
               bool stacked = false);

  BlockMatrix matrix(const Ort::KernelContext& context) const;
  // That of one layer, from its parts of the inputs.
  BlockMatrix checked(const Tensor& quantized, const Tensor& scales, const Tensor& minima) const;
  std::int64_t rows() const { return rows_; }
  static ONNXTensorElementDataType part_type(std::size_t part);
  // Whether rows that are prepared for one matrix serve the other one.
  static bool alike(const BlockMatrix& a, const BlockMatrix& b) {
    return a.blocks == b.blocks && a.size == b.size && a.zero == b.zero;
  }

 private:
  std::size_t first_;
  std::int64_t rows_;
  int bits_, zero_;
  std::optional<BlockMatrix> constant_;
};

}  // namespace dynexport::cpu
