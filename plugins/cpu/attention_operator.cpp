// CachedAttention: shares out the work, and brings the parts together.
#include "attention_operator.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <type_traits>

#include "attention_call.hpp"
#include "rows.hpp"

namespace dynexport::cpu {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

const AttentionKernels& needed_attention() {
  const std::string name = needed_kernels().name;
#if defined(__x86_64__)
  if (name.rfind("avx512", 0) == 0) return kAttentionAvx512;
  if (name == "avx2") return kAttentionAvx2;
#endif
  return kAttentionPortable;
}

std::size_t in_place(int** inputs, int** outputs) {
  static int caches_in[] = {static_cast<int>(kPastKey), static_cast<int>(kPastValue)}, caches_out[] = {1, 2};
  *inputs = caches_in, *outputs = caches_out;
  return 2;
}

}  // namespace

HeadQueries AttentionCall::head_of(std::int64_t index, const float* queries) const {
  const std::int64_t row = index / kv_heads_, head = index % kv_heads_ * group();
  HeadQueries made{};
  made.type = type_;
  made.keys = keys_ + index * head_bytes();
  made.values = values_ + index * head_bytes();
  made.queries = queries + index * tokens_ * group() * channels_;
  made.rows = tokens_ * group();
  made.group = group();
  made.past = past_of(row);
  made.channels = static_cast<int>(channels_);
  made.softcap = softcap_;
  if (bias_ != nullptr) {
    made.bias = bias_ + row * bias_strides_[0] + head * bias_strides_[1];
    made.bias_of_query = bias_strides_[1], made.bias_of_token = bias_strides_[2];
    made.bias_of_entry = bias_strides_[3];
  }
  return made;
}

void AttentionCall::write(std::int64_t row, std::int64_t kv_head, std::int64_t query, const float* values) const {
  float* const to = output_at(row, query / group(), kv_head * group() + query % group());
  const float* const scales = value_scales_.empty() ? nullptr : value_scales_.data() + kv_head * channels_;
  for (std::int64_t c = 0; c < channels_; ++c) to[c] = scales == nullptr ? values[c] : values[c] * scales[c];
}

void AttentionCall::merge(std::int64_t head, std::int64_t query, std::int64_t parts, const Partial& of_head) const {
  const std::int64_t queries = tokens_ * group();
  float peak = of_head.peaks[query], weight = 0, sums[kMostChannels] = {};
  for (std::int64_t p = 1; p < parts; ++p) peak = std::max(peak, of_head.peaks[p * queries + query]);
  for (std::int64_t p = 0; p < parts; ++p) {
    const std::int64_t at = p * queries + query;
    if (of_head.weights[at] == 0) continue;  // nothing was written
    const float factor = std::exp(of_head.peaks[at] - peak);
    weight += factor * of_head.weights[at];
    for (std::int64_t c = 0; c < channels_; ++c) sums[c] += factor * of_head.sums[at * channels_ + c];
  }
  for (std::int64_t c = 0; c < channels_; ++c) sums[c] /= weight;
  write(head / kv_heads_, head % kv_heads_, query, sums);
}

void AttentionCall::attend_in_parts() const {
  // Small parts where there are few entries, so that all threads get some.
  const std::int64_t size = longest_ >= 8 * kMostEntries ? kMostEntries : kMostEntries / 2;
  const std::int64_t parts = (longest_ + size - 1) / size, queries = tokens_ * group(), all = rows_ * kv_heads_;
  const std::int64_t partial = all * parts * queries;
  Scratch memory(static_cast<std::size_t>((all * queries * channels_ + partial * (channels_ + 2)) * 4));
  float* const prepared = memory.take<float>(all * queries * channels_);
  const Partial made{memory.take<float>(partial * channels_), memory.take<float>(partial), memory.take<float>(partial)};
  for (std::int64_t i = 0; i < rows_ * tokens_; ++i) prepare(i / tokens_, i % tokens_, prepared);
  const auto from = [&](std::int64_t at) {
    return Partial{made.sums + at * channels_, made.peaks + at, made.weights + at};
  };
  for_each(context_, all * parts, work(), [&](std::int64_t i) {
    const HeadQueries head = head_of(i / parts, prepared);
    const std::int64_t first = i % parts * size, count = std::min(size, head.past + tokens_ - first);
    const Partial own = from(i * queries);
    if (count > 0) {
      kernels_.part(head, first, count, own);
      return;
    }
    std::fill_n(own.weights, queries, 0.0F);
    std::fill_n(own.peaks, queries, -INFINITY);
  });
  for_each(context_, all, partial * channels_, [&](std::int64_t head) {
    for (std::int64_t query = 0; query < queries; ++query) merge(head, query, parts, from(head * parts * queries));
  });
}

void AttentionCall::attend_in_tiles() const {
  const std::int64_t queries = tokens_ * group(), all = rows_ * kv_heads_;
  const std::int64_t tiles = (queries + kTileRows - 1) / kTileRows;
  Scratch memory(static_cast<std::size_t>(all * queries * channels_ * 4));
  float* const prepared = memory.take<float>(all * queries * channels_);
  for_each(context_, rows_ * tokens_, rows_ * queries * channels_ * kv_heads_ * 8,
           [&](std::int64_t i) { prepare(i / tokens_, i % tokens_, prepared); });
  const std::size_t bytes = (kernels_.tile_bytes(static_cast<int>(channels_)) + 63) / 64 * 64;
  const std::size_t result = sizeof(float) * static_cast<std::size_t>(kTileRows * channels_);
  std::atomic<bool> full{false};
  for_each(context_, all * tiles, work(), [&](std::int64_t i) {
    // The last tiles attend to most: they come first.
    const std::int64_t index = i % all, first = (tiles - 1 - i / all) * kTileRows;
    const int rows = static_cast<int>(std::min<std::int64_t>(kTileRows, queries - first));
    const std::unique_ptr<void, Free> own(std::aligned_alloc(64, bytes + result));
    if (own == nullptr) {
      full = true;  // an exception must not leave a thread of ONNX Runtime
      return;
    }
    auto* const y = reinterpret_cast<float*>(static_cast<char*>(own.get()) + bytes);
    kernels_.tile(head_of(index, prepared), first, rows, y, own.get());
    for (int r = 0; r < rows; ++r) write(index / kv_heads_, index % kv_heads_, first + r, y + r * channels_);
  });
  if (full) throw std::bad_alloc();
}

AttentionNode::AttentionNode(const Ort::ConstKernelInfo& info)
    : kernels_(needed_attention()),
      heads_(attribute(info, "num_heads", 1, 1 << 20)),
      kv_heads_(attribute(info, "kv_num_heads", 1, heads_)),
      scale_(info.GetAttribute<float>("scale")),
      softcap_(info.GetAttribute<float>("softcap")) {
  if (heads_ % kv_heads_ != 0) refuse("num_heads", "a multiple of kv_num_heads", std::to_string(heads_));
  if (!(softcap_ >= 0)) refuse("softcap", "0 or a positive number", std::to_string(softcap_));
}

void AttentionNode::run(const Ort::KernelContext& context, CacheType type) const {
  AttentionCall(context, kernels_, type, heads_, kv_heads_, scale_, softcap_).run();
}

template <class T>
ONNXTensorElementDataType CachedAttention<T>::output_type(std::size_t output) {
  if (output == 0) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return Ort::TypeToTensorType<T>::type;
}

template <class T>
ONNXTensorElementDataType CachedAttention<T>::input_type(std::size_t input) {
  switch (input) {
    case kPastKey:
    case kPastValue:
      return output_type(1);
    case kLastIndex:
    case kLastIndex + 1:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case kPositions:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

template <class T>
void CachedAttention<T>::describe(OrtCustomOp& made) {
  made.GetMayInplace = in_place;
  made.ReleaseMayInplace = [](int*, int*) {};
}

template <class T>
void CachedAttention<T>::run(const Ort::KernelContext& context) const {
  constexpr CacheType type = std::is_same_v<T, float>         ? CacheType::kFloat
                             : std::is_same_v<T, std::int8_t> ? CacheType::kInt8
                                                              : CacheType::kHalf;
  node_.run(context, type);
}

template class CachedAttention<float>;
template class CachedAttention<Ort::Float16_t>;
template class CachedAttention<std::int8_t>;

}  // namespace dynexport::cpu
