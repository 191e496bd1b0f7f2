// Products and norms in which every row has the weights of the layer that it chose, out of those of all layers.
//
// Weights are stacks [layers, ..]; input 1, ``index`` int64 [rows], names each row's layer. A row with -1 has none: its
// products are zeros, and nothing is read for it.
#pragma once

#include "block_operators.hpp"
#include "half_operators.hpp"

namespace dynexport::cpu {

class SelectedBlockMatMul : public Computed<SelectedBlockMatMul> {
 public:
  explicit SelectedBlockMatMul(const Ort::ConstKernelInfo& info) : kernels_(needed_kernels()), form_(info) {}

  static constexpr const char* kName = "SelectedBlockMatMul";
  static constexpr std::size_t kInputs = 5;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
  BlockForm form_;
};

class SelectedHalfMatMul : public Computed<SelectedHalfMatMul> {
 public:
  explicit SelectedHalfMatMul(const Ort::ConstKernelInfo& info);

  static constexpr const char* kName = "SelectedHalfMatMul";
  static constexpr std::size_t kInputs = 3;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
  std::int64_t rows_;
};

class SelectedFloatMatMul : public Computed<SelectedFloatMatMul> {
 public:
  explicit SelectedFloatMatMul(const Ort::ConstKernelInfo&) : kernels_(needed_kernels()) {}

  static constexpr const char* kName = "SelectedFloatMatMul";
  static constexpr std::size_t kInputs = 3;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
};

// RMSNorm of x, and of x + residual, which is the second result.
template <bool kAdds>
class SelectedRmsNorm : public Computed<SelectedRmsNorm<kAdds>> {
 public:
  explicit SelectedRmsNorm(const Ort::ConstKernelInfo&) {}

  static constexpr const char* kName = kAdds ? "SelectedAddNorm" : "SelectedNorm";
  static constexpr std::size_t kInputs = kAdds ? 5 : 4;
  static constexpr std::size_t kOutputs = kAdds ? 2 : 1;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;
};

using SelectedNorm = SelectedRmsNorm<false>;
using SelectedAddNorm = SelectedRmsNorm<true>;

}  // namespace dynexport::cpu
