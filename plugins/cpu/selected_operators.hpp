// Products and norms in which every row has the weights of the layer that it chose, out of those of all layers.
//
// Weights are stacks [layers, ..]; input 1, ``index`` int64 [rows], names each row's layer. A row with -1 has none: its
// products are zeros, and nothing is read for it.
#pragma once

#include "block_weights.hpp"
#include "half_weights.hpp"
#include "rows.hpp"

namespace dynexport::cpu {

template <class Weights>
class SelectedMatMul : public Computed<SelectedMatMul<Weights>> {
 public:
  explicit SelectedMatMul(const Ort::ConstKernelInfo& info)
      : kernels_(needed_kernels()), weights_(info, 2, rows_of_matrix(info), "", true) {}

  static constexpr const char* kName = Weights::kSelected;
  static constexpr std::size_t kInputs = 2 + Weights::kParts;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
  Weights weights_;
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
  explicit SelectedRmsNorm(const Ort::ConstKernelInfo&) : kernels_(needed_kernels()) {}

  static constexpr const char* kName = kAdds ? "SelectedAddNorm" : "SelectedNorm";
  static constexpr std::size_t kInputs = kAdds ? 5 : 4;
  static constexpr std::size_t kOutputs = kAdds ? 2 : 1;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;

 private:
  const Kernels& kernels_;
};

using SelectedNorm = SelectedRmsNorm<false>;
using SelectedAddNorm = SelectedRmsNorm<true>;

}  // namespace dynexport::cpu
