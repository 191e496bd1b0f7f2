// CachedAttention's inputs: checks, rotation, and the append.
#include "attention_call.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

namespace dynexport::cpu {
namespace {

Tensor input(const Ort::KernelContext& context, std::size_t index, const char* name, const Shape& expected) {
  Tensor found = tensor_of(context.GetInput(index));
  if (found.shape != expected) refuse(name, text_of(expected), text_of(found.shape));
  return found;
}

// A tensor that is broadcast to a shape, and its strides: 0 along an axis of size 1.
struct Broadcast {
  const float* data;
  Shape strides;

  Broadcast(const Ort::KernelContext& context, std::size_t index, const char* name, const Shape& to) {
    const Tensor found = tensor_of(context.GetInput(index));
    bool fits = found.shape.size() == to.size() && found.data != nullptr;
    for (std::size_t i = 0; fits && i < to.size(); ++i) fits = found.shape[i] == 1 || found.shape[i] == to[i];
    if (!fits) refuse(name, text_of(to) + ", or 1 for any of these", text_of(found.shape));
    data = static_cast<const float*>(found.data);
    for (std::size_t i = 0; i < to.size(); ++i)
      strides.push_back(found.shape[i] == 1 ? 0 : product(found.shape, i + 1, to.size()));
  }
};

}  // namespace

void AttentionCall::read_cache() {
  const Tensor key = tensor_of(context_.GetInput(kPastKey));
  if (key.shape.size() != 4 || key.shape[1] != kv_heads_ || key.shape[3] % kChannels != 0 || key.shape[3] == 0 ||
      key.shape[3] > kMostChannels)
    refuse("past_key",
           "[rows, " + std::to_string(kv_heads_) + ", slots, channels in multiples of 8 up to " +
               std::to_string(kMostChannels) + "]",
           text_of(key.shape));
  rows_ = key.shape[0], slots_ = key.shape[2], channels_ = key.shape[3];
  const Tensor value = input(context_, kPastValue, "past_value", key.shape);
  key_scales_ = scales(kKeyScale, "key_scale");
  value_scales_ = scales(kValueScale, "value_scale");
  keys_ = present(1, key);
  values_ = present(2, value);
}

char* AttentionCall::present(std::size_t index, const Tensor& past) const {
  auto* const made = static_cast<char*>(context_.GetOutput(index, past.shape).GetTensorMutableRawData());
  if (past.data != nullptr && made != past.data)
    std::memcpy(made, past.data, static_cast<std::size_t>(rows_ * kv_heads_ * head_bytes()));
  return made;
}

std::vector<float> AttentionCall::scales(std::size_t index, const char* name) const {
  const Broadcast found(context_, index, name, {1, kv_heads_, 1, channels_});
  std::vector<float> made;
  if (type_ != CacheType::kInt8) return made;
  for (std::int64_t h = 0; h < kv_heads_; ++h)
    for (std::int64_t c = 0; c < channels_; ++c) {
      made.push_back(found.data[h * found.strides[1] + c * found.strides[3]]);
      if (!(made.back() > 0) || std::isinf(made.back())) refuse(name, "positive numbers", std::to_string(made.back()));
    }
  return made;
}

void AttentionCall::read_tokens() {
  const Tensor packed = tensor_of(context_.GetInput(kPacked));
  const std::int64_t features = (heads_ + 2 * kv_heads_) * channels_;
  if (packed.shape.size() != 3 || packed.shape[0] != rows_ || packed.shape[2] != features)
    refuse("packed", "[" + std::to_string(rows_) + ", tokens, " + std::to_string(features) + "]",
           text_of(packed.shape));
  tokens_ = packed.shape[1];
  packed_ = static_cast<const float*>(packed.data);
  last_ = static_cast<const std::int32_t*>(input(context_, kLastIndex, "last_index", {rows_}).data);
  for (std::int64_t b = 0; b < rows_; ++b) {
    if (last_[b] < tokens_ - 1 || last_[b] >= slots_)
      refuse("last_index", std::to_string(tokens_ - 1) + ".." + std::to_string(slots_ - 1), std::to_string(last_[b]));
    longest_ = std::max<std::int64_t>(longest_, last_[b] + 1);
  }
}

void AttentionCall::read_rotation() {
  const Tensor cos = tensor_of(context_.GetInput(kCos));
  if (cos.shape.size() != 2 || cos.shape[1] * 2 > channels_)
    refuse("cos", "[positions, half of up to " + std::to_string(channels_) + " channels]", text_of(cos.shape));
  rotated_ = cos.shape[1] * 2;
  const Tensor sin = input(context_, kSin, "sin", cos.shape);
  if (rotated_ == 0) return;
  cos_ = static_cast<const float*>(cos.data), sin_ = static_cast<const float*>(sin.data);
  positions_ = static_cast<const std::int64_t*>(input(context_, kPositions, "position_ids", {rows_, tokens_}).data);
  for (std::int64_t i = 0; i < rows_ * tokens_; ++i)
    if (positions_[i] < 0 || positions_[i] >= cos.shape[0])
      refuse("position_ids", "0.." + std::to_string(cos.shape[0] - 1), std::to_string(positions_[i]));
}

void AttentionCall::read_bias() {
  const Shape found = tensor_of(context_.GetInput(kBias)).shape;
  const std::int64_t entries = found.empty() || found.back() == 1 ? 1 : std::max(found.back(), longest_);
  const Broadcast bias(context_, kBias, "bias", {rows_, heads_, tokens_, entries});
  if (product(found, 0, found.size()) == 1 && *bias.data == 0) return;
  bias_ = bias.data, bias_strides_ = bias.strides;
}

void AttentionCall::rotate(const float* from, std::int64_t row, std::int64_t token, float* to) const {
  const std::int64_t half = rotated_ / 2;
  if (half > 0) {
    const std::int64_t place = positions_[row * tokens_ + token] * half;
    for (std::int64_t i = 0; i < half; ++i) {
      const float cos = cos_[place + i], sin = sin_[place + i];
      to[i] = from[i] * cos - from[i + half] * sin;
      to[i + half] = from[i + half] * cos + from[i] * sin;
    }
  }
  for (std::int64_t i = rotated_; i < channels_; ++i) to[i] = from[i];
}

// Appends a token's entries, and writes its queries where those of its head lie: [rows, kv_heads, tokens, group, ..].
void AttentionCall::prepare(std::int64_t row, std::int64_t token, float* queries) const {
  float turned[kMostChannels];
  for (std::int64_t h = 0; h < kv_heads_; ++h) {
    const float* const scales = key_scales_.empty() ? nullptr : key_scales_.data() + h * channels_;
    const float* const value_scales = value_scales_.empty() ? nullptr : value_scales_.data() + h * channels_;
    for (std::int64_t g = 0; g < group(); ++g) {
      float* const to = queries + (((row * kv_heads_ + h) * tokens_ + token) * group() + g) * channels_;
      rotate(packed_at(row, token, h * group() + g), row, token, to);
      for (std::int64_t c = 0; c < channels_; ++c) to[c] *= scales == nullptr ? scale_ : scale_ * scales[c];
    }
    const std::int64_t entry = (past_of(row) + token) * channels_ * bytes_of(type_);
    const std::int64_t at = (row * kv_heads_ + h) * head_bytes() + entry;
    rotate(packed_at(row, token, heads_ + h), row, token, turned);
    kernels_.store(type_, turned, scales, static_cast<int>(channels_), keys_ + at);
    kernels_.store(type_, packed_at(row, token, heads_ + kv_heads_ + h), value_scales, static_cast<int>(channels_),
                   values_ + at);
  }
}

}  // namespace dynexport::cpu
