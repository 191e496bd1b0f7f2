// RouteTokens, GatherTokens and ScatterGated: a router's decision, and the chosen tokens' way into a layer and back.
#pragma once

#include "context.hpp"

namespace dynexport::cpu {

// Which tokens run: sigmoid(x . weight + bias) + told against a threshold, and no more of a row than there is room for.
class RouteTokens : public Computed<RouteTokens> {
 public:
  explicit RouteTokens(const Ort::ConstKernelInfo& info) : inclusive_(attribute(info, "inclusive", 0, 1) == 1) {}

  static constexpr const char* kName = "RouteTokens";
  static constexpr std::size_t kInputs = 6;
  static constexpr std::size_t kOutputs = 4;
  static ONNXTensorElementDataType input_type(std::size_t input);
  static ONNXTensorElementDataType output_type(std::size_t output);
  void run(const Ort::KernelContext& context) const;

 private:
  bool inclusive_;
};

// The chosen tokens of all rows, concatenated, and their places.
class GatherTokens : public Computed<GatherTokens> {
 public:
  explicit GatherTokens(const Ort::ConstKernelInfo&) {}

  static constexpr const char* kName = "GatherTokens";
  static constexpr std::size_t kInputs = 2;
  static constexpr std::size_t kOutputs = 2;
  static ONNXTensorElementDataType input_type(std::size_t input);
  static ONNXTensorElementDataType output_type(std::size_t output);
  void run(const Ort::KernelContext& context) const;
};

// x with x + gate * (y - x) at the places of y.
class ScatterGated : public Computed<ScatterGated> {
 public:
  explicit ScatterGated(const Ort::ConstKernelInfo& info) : sigmoid_(attribute(info, "sigmoid", 0, 1) == 1) {}

  static constexpr const char* kName = "ScatterGated";
  static constexpr std::size_t kInputs = 4;
  static ONNXTensorElementDataType input_type(std::size_t input);
  void run(const Ort::KernelContext& context) const;

 private:
  bool sigmoid_;
};

}  // namespace dynexport::cpu
