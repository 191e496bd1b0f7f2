// HalfMatMul and HalfGather: products with, and rows of, a matrix of 16-bit floats.
#pragma once

#include <optional>

#include "context.hpp"
#include "kernels.hpp"

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

class HalfMatMul : public Computed<HalfMatMul> {
 public:
  static constexpr const char* kName = "HalfMatMul";
  static constexpr std::size_t kInputs = 2;
  static ONNXTensorElementDataType input_type(std::size_t input);

  explicit HalfMatMul(const Ort::ConstKernelInfo& info);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
  HalfWeights weights_;
};

class HalfGather : public Computed<HalfGather> {
 public:
  static constexpr const char* kName = "HalfGather";
  static constexpr std::size_t kInputs = 2;
  static ONNXTensorElementDataType input_type(std::size_t input);

  explicit HalfGather(const Ort::ConstKernelInfo& info);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
  HalfWeights weights_;
};

}  // namespace dynexport::cpu
