// ChooseLayer: the decision of one hop of a Radial Network.
#pragma once

#include "context.hpp"
#include "rows.hpp"

namespace dynexport::cpu {

// Inputs: x [rows, 1, hidden], which the router norms; its norm [hidden], epsilon, fc1 [units, hidden] and bias, fc2
// [choices, units] and bias; forced int64 [hops, rows, 1], -1 where the router decides; before int64 [rows], negative
// for a row that is at its end; seen bool [rows, choices], layers that the row ran.
//
// Results: index int64 [rows], the chosen layer or -1; any bool [], whether a row has one; seen, with the choice unless
// layers may come again; path int64, score and margin float32 [1, rows, 1], as a bundle's outputs; gate float32 [rows],
// the choice's probability.
class ChooseLayer : public Computed<ChooseLayer> {
 public:
  explicit ChooseLayer(const Ort::ConstKernelInfo& info);

  static constexpr const char* kName = "ChooseLayer";
  static constexpr std::size_t kInputs = 10;
  static constexpr std::size_t kOutputs = 7;
  static ONNXTensorElementDataType input_type(std::size_t input);
  static ONNXTensorElementDataType output_type(std::size_t output);
  void run(const Ort::KernelContext& context) const;

 private:
  struct Router;
  struct Choice;
  Choice choose(const float* scores, std::int64_t choices, const bool* seen, std::int64_t forced) const;

  const Kernels& kernels_;
  std::int64_t hop_, layers_;
  bool exits_, reuses_;
};

}  // namespace dynexport::cpu
