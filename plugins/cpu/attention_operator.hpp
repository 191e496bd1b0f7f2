// CachedAttention: rotate, append to a cache in place, and attend to it.
#pragma once

#include "attention.hpp"
#include "context.hpp"

namespace dynexport::cpu {

// What does not depend on the type of the cache.
class AttentionNode {
 public:
  explicit AttentionNode(const Ort::ConstKernelInfo& info);

  void run(const Ort::KernelContext& context, CacheType type) const;

 private:
  const AttentionKernels& kernels_;
  std::int64_t heads_, kv_heads_;
  float scale_, softcap_;
};

// ``T``: the type of the cache.
template <class T>
class CachedAttention : public Computed<CachedAttention<T>> {
 public:
  explicit CachedAttention(const Ort::ConstKernelInfo& info) : node_(info) {}

  static constexpr const char* kName = "CachedAttention";
  static constexpr std::size_t kInputs = 11, kOutputs = 3;
  static ONNXTensorElementDataType input_type(std::size_t input);
  static ONNXTensorElementDataType output_type(std::size_t output);
  // The caches' outputs may be their inputs.
  static void describe(OrtCustomOp& made);
  void run(const Ort::KernelContext& context) const;

 private:
  AttentionNode node_;
};

}  // namespace dynexport::cpu
