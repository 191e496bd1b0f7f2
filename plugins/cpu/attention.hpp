// The kernels of attention of one instruction set, and what they read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynexport::cpu {

enum class CacheType { kFloat, kHalf, kInt8 };

// Most entries of one part, and rows of one tile.
constexpr std::int64_t kMostEntries = 256;
constexpr int kTileRows = 64;
// Channels of a head are a multiple of these, and no more than these.
constexpr int kChannels = 8;
constexpr std::int64_t kMostChannels = 1024;

// The keys and values of one head of one row of the batch, and all queries that attend to them. Query r is that of
// token r / group, and attends to the entries before past + r / group + 1.
struct HeadQueries {
  CacheType type;
  const void* keys;      // [entries, channels]
  const void* values;    // [entries, channels]
  const float* queries;  // [rows, channels], multiplied by the scale of the scores, and by those of int8 keys
  std::int64_t rows;
  std::int64_t group;
  std::int64_t past;
  int channels;
  float softcap;                                             // 0: none
  const float* bias;                                         // added to the scores; null: none
  std::int64_t bias_of_query, bias_of_token, bias_of_entry;  // strides, of a query within its token's group first
};

// What remains of the softmax over some entries, for every query.
struct Partial {
  float* sums;     // [rows, channels], values weighted by exp(score - peak)
  float* peaks;    // [rows], the largest score; minus infinity where no entry counts
  float* weights;  // [rows], the sum of exp(score - peak)
};

struct AttentionKernels {
  // Writes one entry: float16 and int8 round to the nearest, halves to even; int8 divides by a scale per channel first.
  void (*store)(CacheType type, const float* values, const float* scales, int channels, void* entry);
  // All queries over entries first .. first + count - 1, at most kMostEntries.
  void (*part)(const HeadQueries& head, std::int64_t first, std::int64_t count, const Partial& made);
  // The bytes that ``tile`` works in.
  std::size_t (*tile_bytes)(int channels);
  // ``rows`` queries from ``first`` on, at most kTileRows, over all their entries: y [rows, channels]. ``memory`` is
  // aligned to 64 bytes.
  void (*tile)(const HeadQueries& head, std::int64_t first, int rows, float* y, void* memory);
};

extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
#endif

}  // namespace dynexport::cpu
