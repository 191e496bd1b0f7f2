// One call of CachedAttention: what it was given, and the work to share out.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.hpp"
#include "context.hpp"

namespace dynexport::cpu {

// The inputs.
constexpr std::size_t kPacked = 0, kPastKey = 1, kPastValue = 2, kLastIndex = 3, kCos = 5, kSin = 6, kPositions = 7,
                      kBias = 8, kKeyScale = 9, kValueScale = 10;
// Up to so many tokens of a row the entries are shared out, as there are few queries.
constexpr std::int64_t kFewTokens = 3;
constexpr std::int64_t bytes_of(CacheType type) {
  return type == CacheType::kFloat ? 4 : type == CacheType::kHalf ? 2 : 1;
}

// One call.
class AttentionCall {
 public:
  AttentionCall(const Ort::KernelContext& context, const AttentionKernels& kernels, CacheType type, std::int64_t heads,
                std::int64_t kv_heads, float scale, float softcap)
      : context_(context),
        kernels_(kernels),
        type_(type),
        heads_(heads),
        kv_heads_(kv_heads),
        scale_(scale),
        softcap_(softcap) {
    read_cache();
    read_tokens();
    read_rotation();
    read_bias();
    output_ = context.GetOutput(0, {rows_, tokens_, heads_ * channels_}).GetTensorMutableData<float>();
  }

  void run() {
    if (rows_ * tokens_ == 0) return;
    if (tokens_ <= kFewTokens)
      attend_in_parts();
    else
      attend_in_tiles();
  }

 private:
  void read_cache();
  void read_tokens();
  void read_rotation();
  void read_bias();
  std::vector<float> scales(std::size_t index, const char* name) const;
  char* present(std::size_t index, const Tensor& past) const;

  std::int64_t group() const { return heads_ / kv_heads_; }
  std::int64_t past_of(std::int64_t row) const { return last_[row] + 1 - tokens_; }
  std::int64_t head_bytes() const { return slots_ * channels_ * bytes_of(type_); }
  const float* packed_at(std::int64_t row, std::int64_t token, std::int64_t head) const {
    return packed_ + ((row * tokens_ + token) * (heads_ + 2 * kv_heads_) + head) * channels_;
  }
  float* output_at(std::int64_t row, std::int64_t token, std::int64_t head) const {
    return output_ + ((row * tokens_ + token) * heads_ + head) * channels_;
  }

  void rotate(const float* from, std::int64_t row, std::int64_t token, float* to) const;
  void prepare(std::int64_t row, std::int64_t token, float* queries) const;
  HeadQueries head_of(std::int64_t index, const float* queries) const;
  void write(std::int64_t row, std::int64_t kv_head, std::int64_t query, const float* values) const;
  void merge(std::int64_t head, std::int64_t query, std::int64_t parts, const Partial& of_head) const;
  void attend_in_parts() const;
  void attend_in_tiles() const;
  std::int64_t work() const { return rows_ * heads_ * tokens_ * longest_ * channels_ * 2; }

  const Ort::KernelContext& context_;
  const AttentionKernels& kernels_;
  CacheType type_;
  std::int64_t heads_, kv_heads_;
  float scale_, softcap_;
  std::int64_t rows_ = 0, tokens_ = 0, slots_ = 0, channels_ = 0, longest_ = 0;
  const float* packed_ = nullptr;
  const std::int32_t* last_ = nullptr;
  char *keys_ = nullptr, *values_ = nullptr;
  std::vector<float> key_scales_, value_scales_;  // [kv_heads, channels]; empty unless the cache is int8
  const float *cos_ = nullptr, *sin_ = nullptr;
  const std::int64_t* positions_ = nullptr;
  std::int64_t rotated_ = 0;  // channels
  const float* bias_ = nullptr;
  Shape bias_strides_;
  float* output_ = nullptr;
};

}  // namespace dynexport::cpu
