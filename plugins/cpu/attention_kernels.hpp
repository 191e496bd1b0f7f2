// The kernels of attention, written once for every instruction set; as products.hpp, only for files of one set each.
#pragma once

#include "attention.hpp"
#include "attention_vectors.hpp"

namespace dynexport::cpu {
namespace {

constexpr float kNever = -__builtin_inff();

#if defined(__AVX512F__)
constexpr int kWidest = 16, kTileKeys = 8, kTileValues = 4;
#elif defined(__AVX2__)
constexpr int kWidest = 8, kTileKeys = 4, kTileValues = 2;
#else
constexpr int kWidest = 4, kTileKeys = 4, kTileValues = 2;
#endif
// Entries of one block of a tile.
constexpr int kBlock = 64;

// The number of entries from ``first`` on, at most ``count``, that a query attends to.
inline std::int64_t visible(const HeadQueries& head, std::int64_t query, std::int64_t first, std::int64_t count) {
  const std::int64_t seen = head.past + query / head.group + 1 - first;
  return seen < 0 ? 0 : seen < count ? seen : count;
}

inline const float* bias_of(const HeadQueries& head, std::int64_t query) {
  return head.bias + query % head.group * head.bias_of_query + query / head.group * head.bias_of_token;
}

// The scores of R queries and ``count`` keys: scores [R, kMostEntries].
template <int L, class T, int R>
inline void multiply_keys(const float* queries, const T* keys, std::int64_t count, int channels, float* scores) {
  for (std::int64_t k = 0; k < count; k += 4) {
    const T* at[4];
    for (int i = 0; i < 4; ++i) at[i] = keys + (k + i < count ? k + i : count - 1) * channels;
    Floats<L> sums[R][4] = {};
    for (int c = 0; c < channels; c += L) {
      Floats<L> key[4];
      for (int i = 0; i < 4; ++i) key[i] = load<L>(at[i] + c);
      for (int r = 0; r < R; ++r) {
        const Floats<L> query = load<L>(queries + static_cast<std::int64_t>(r) * channels + c);
        for (int i = 0; i < 4; ++i) sums[r][i] += query * key[i];
      }
    }
    for (int r = 0; r < R; ++r) store<4>(scores + r * kMostEntries + k, totals<L>(sums[r]));
  }
}

// Caps, biases and masks the scores of one query, and makes them weights; sets peak and weight.
template <int L>
inline void weigh(const HeadQueries& head, std::int64_t query, std::int64_t first, std::int64_t count, float* scores,
                  float* peak, float* weight) {
  const std::int64_t seen = visible(head, query, first, count), padded = (count + L - 1) / L * L;
  if (head.softcap > 0)
    for (std::int64_t k = 0; k < padded; k += L) store<L>(scores + k, capped<L>(load<L>(scores + k), head.softcap));
  if (head.bias != nullptr) {
    const float* const bias = bias_of(head, query) + first * head.bias_of_entry;
    for (std::int64_t k = 0; k < seen; ++k) scores[k] += bias[k * head.bias_of_entry];
  }
  for (std::int64_t k = seen; k < padded; ++k) scores[k] = kNever;
  Floats<L> most = all<L>(kNever), sum = {};
  for (std::int64_t k = 0; k < padded; k += L) most = larger<L>(load<L>(scores + k), most);
  *peak = largest<L>(most);
  for (std::int64_t k = 0; k < padded; k += L) {
    const Floats<L> weights = seen == 0 ? Floats<L>{} : exponential<L>(load<L>(scores + k) - *peak);
    store<L>(scores + k, weights);
    sum += weights;
  }
  *weight = total<L>(sum);
}

// sums [R, channels] of D vectors from channel ``c`` on.
template <int L, class T, int R, int D>
inline void multiply_values(const float* weights, const T* values, std::int64_t count, int channels, int c,
                            float* sums) {
  Floats<L> made[R][D] = {};
  for (std::int64_t k = 0; k < count; ++k) {
    Floats<L> value[D];
    for (int d = 0; d < D; ++d) value[d] = load<L>(values + k * channels + c + d * L);
    for (int r = 0; r < R; ++r)
      for (int d = 0; d < D; ++d) made[r][d] += value[d] * weights[r * kMostEntries + k];
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) store<L>(sums + static_cast<std::int64_t>(r) * channels + c + d * L, made[r][d]);
}

template <int L, class T, int R>
void part_of(const HeadQueries& head, std::int64_t query, std::int64_t first, std::int64_t count, const Partial& made) {
  alignas(64) float scores[R * kMostEntries];
  const std::int64_t skipped = first * head.channels;
  const float* const queries = head.queries + query * head.channels;
  multiply_keys<L, T, R>(queries, static_cast<const T*>(head.keys) + skipped, count, head.channels, scores);
  for (int r = 0; r < R; ++r)
    weigh<L>(head, query + r, first, count, scores + r * kMostEntries, made.peaks + query + r,
             made.weights + query + r);
  const T* const values = static_cast<const T*>(head.values) + skipped;
  float* const sums = made.sums + query * head.channels;
  int c = 0;
  for (; c + 4 * L <= head.channels; c += 4 * L)
    multiply_values<L, T, R, 4>(scores, values, count, head.channels, c, sums);
  for (; c < head.channels; c += L) multiply_values<L, T, R, 1>(scores, values, count, head.channels, c, sums);
}

template <int L, class T>
void part(const HeadQueries& head, std::int64_t first, std::int64_t count, const Partial& made) {
  for (std::int64_t query = 0; query < head.rows;) {
    switch (head.rows - query) {
      case 1:
        part_of<L, T, 1>(head, query, first, count, made);
        return;
      case 2:
        part_of<L, T, 2>(head, query, first, count, made);
        return;
      case 4:
        part_of<L, T, 4>(head, query, first, count, made);
        return;
      default:
        part_of<L, T, 3>(head, query, first, count, made);
        query += 3;
    }
  }
}

// The memory of a tile.
struct Tile {
  float* queries;      // [channels, kTileRows]
  float* scores;       // [kBlock, kTileRows]
  float* keys;         // [kBlock, channels], where they are not float32
  float* values;       // as keys
  float* sums;         // [kTileRows, channels]
  float* peaks;        // [kTileRows]
  float* weights;      // [kTileRows]
  float* factors;      // [kTileRows], by which a block changes the sums of those before
  std::int32_t* seen;  // [kTileRows], entries of the block that a query attends to

  Tile(void* memory, int channels) : queries(static_cast<float*>(memory)) {
    scores = queries + channels * kTileRows;
    keys = scores + kBlock * kTileRows;
    values = keys + kBlock * channels;
    sums = values + kBlock * channels;
    peaks = sums + channels * kTileRows;
    weights = peaks + kTileRows;
    factors = weights + kTileRows;
    seen = reinterpret_cast<std::int32_t*>(factors + kTileRows);
  }
  static std::size_t bytes(int channels) {
    return sizeof(float) *
           (2 * (kTileRows + kBlock) * static_cast<std::size_t>(channels) + kBlock * kTileRows + 4 * kTileRows);
  }
};

// Entries as float32 [count, channels]: as they are, or widened into ``into``.
template <int L, class T>
inline const float* widened(const T* entries, std::int64_t count, int channels, float* into) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return entries;
  } else {
    for (std::int64_t i = 0; i < count * channels; i += L) store<L>(into + i, load<L>(entries + i));
    return into;
  }
}

// K keys against two vectors of queries, of which ``row`` is the first: scores [kBlock, kTileRows].
template <int L, int K>
inline void tile_scores(const Tile& tile, const float* keys, int channels, int row, float* scores) {
  Floats<L> sums[K][2] = {};
  for (int c = 0; c < channels; ++c) {
    const float* const at = tile.queries + c * kTileRows + row;
    const Floats<L> a = load<L>(at), b = load<L>(at + L);
    for (int k = 0; k < K; ++k) {
      const float key = keys[k * channels + c];
      sums[k][0] += a * key;
      sums[k][1] += b * key;
    }
  }
  for (int k = 0; k < K; ++k) {
    store<L>(scores + k * kTileRows + row, sums[k][0]);
    store<L>(scores + k * kTileRows + row + L, sums[k][1]);
  }
}

// Caps, biases and masks the scores of one block, makes them weights, and brings peaks and weights up to date.
template <int L>
inline void tile_weigh(const HeadQueries& head, const Tile& tile, std::int64_t query, int rows, std::int64_t first,
                       int count) {
  if (head.softcap > 0)
    for (int i = 0; i < count * kTileRows; i += L)
      store<L>(tile.scores + i, capped<L>(load<L>(tile.scores + i), head.softcap));
  if (head.bias != nullptr)
    for (int r = 0; r < rows; ++r) {
      const float* const bias = bias_of(head, query + r) + first * head.bias_of_entry;
      for (int k = 0; k < tile.seen[r]; ++k) tile.scores[k * kTileRows + r] += bias[k * head.bias_of_entry];
    }
  for (int r = 0; r < rows; r += L) {
    Integers<L> seen;
    std::memcpy(&seen, tile.seen + r, sizeof(seen));
    const Floats<L> before = load<L>(tile.peaks + r);
    Floats<L> most = before;
    for (int k = 0; k < count; ++k) {
      float* const at = tile.scores + k * kTileRows + r;
      const Floats<L> masked = seen > k ? load<L>(at) : all<L>(kNever);
      store<L>(at, masked);
      most = larger<L>(masked, most);
    }
    const Floats<L> factor = exponential<L>(before - most);
    Floats<L> sum = load<L>(tile.weights + r) * factor;
    for (int k = 0; k < count; ++k) {
      float* const at = tile.scores + k * kTileRows + r;
      const Floats<L> weights = exponential<L>(load<L>(at) - most);
      store<L>(at, weights);
      sum += weights;
    }
    store<L>(tile.peaks + r, most);
    store<L>(tile.weights + r, sum);
    store<L>(tile.factors + r, factor);
  }
}

// Adds a block's values to four rows of sums, D vectors from channel ``c`` on.
template <int L, int D>
inline void tile_values(const Tile& tile, const float* values, int count, int channels, int row, int c) {
  Floats<L> made[4][D] = {};
  for (int k = 0; k < count; ++k) {
    Floats<L> value[D];
    for (int d = 0; d < D; ++d) value[d] = load<L>(values + k * channels + c + d * L);
    const float* const weights = tile.scores + k * kTileRows + row;
    for (int r = 0; r < 4; ++r)
      for (int d = 0; d < D; ++d) made[r][d] += value[d] * weights[r];
  }
  for (int r = 0; r < 4; ++r)
    for (int d = 0; d < D; ++d) {
      float* const at = tile.sums + (row + r) * channels + c + d * L;
      store<L>(at, load<L>(at) * tile.factors[row + r] + made[r][d]);
    }
}

template <int L>
void tile_block(const HeadQueries& head, const Tile& tile, const float* keys, const float* values, std::int64_t query,
                int rows, std::int64_t first, int count) {
  const int channels = head.channels;
  for (int row = 0; row < rows; row += 2 * L) {
    int k = 0;
    for (; k + kTileKeys <= count; k += kTileKeys)
      tile_scores<L, kTileKeys>(tile, keys + k * channels, channels, row, tile.scores + k * kTileRows);
    for (; k < count; ++k) tile_scores<L, 1>(tile, keys + k * channels, channels, row, tile.scores + k * kTileRows);
  }
  tile_weigh<L>(head, tile, query, rows, first, count);
  for (int row = 0; row < rows; row += 4) {
    int c = 0;
    for (; c + kTileValues * L <= channels; c += kTileValues * L)
      tile_values<L, kTileValues>(tile, values, count, channels, row, c);
    for (; c < channels; c += L) tile_values<L, 1>(tile, values, count, channels, row, c);
  }
}

template <int L, class T>
void tile(const HeadQueries& head, std::int64_t query, int rows, float* y, void* memory) {
  const int channels = head.channels;
  const Tile tile(memory, channels);
  std::memset(memory, 0, Tile::bytes(channels));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < channels; ++c) tile.queries[c * kTileRows + r] = head.queries[(query + r) * channels + c];
  for (int r = 0; r < kTileRows; ++r) tile.peaks[r] = kNever;
  const std::int64_t end = head.past + (query + rows - 1) / head.group + 1;
  for (std::int64_t first = 0; first < end; first += kBlock) {
    const int count = static_cast<int>(end - first < kBlock ? end - first : kBlock);
    // Rows that fill the tile attend to what the last one does.
    for (int r = 0; r < kTileRows; ++r)
      tile.seen[r] = static_cast<std::int32_t>(visible(head, query + (r < rows ? r : rows - 1), first, count));
    const T* const keys = static_cast<const T*>(head.keys) + first * channels;
    const T* const values = static_cast<const T*>(head.values) + first * channels;
    tile_block<L>(head, tile, widened<L>(keys, count, channels, tile.keys),
                  widened<L>(values, count, channels, tile.values), query, rows, first, count);
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < channels; c += L)
      store<L>(y + static_cast<std::int64_t>(r) * channels + c,
               load<L>(tile.sums + r * channels + c) / tile.weights[r]);
}

template <int L>
void store_entry(CacheType type, const float* values, const float* scales, int channels, void* entry) {
  for (int c = 0; c < channels; c += L) {
    const Floats<L> value = load<L>(values + c);
    switch (type) {
      case CacheType::kFloat:
        store<L>(static_cast<float*>(entry) + c, value);
        break;
      case CacheType::kHalf:
        store<L>(static_cast<Half*>(entry) + c, value);
        break;
      case CacheType::kInt8:
        store<L>(static_cast<std::int8_t*>(entry) + c, value / load<L>(scales + c));
    }
  }
}

template <class Function>
inline void with_type(CacheType type, const Function& function) {
  switch (type) {
    case CacheType::kFloat:
      return function(float{});
    case CacheType::kHalf:
      return function(Half{});
    case CacheType::kInt8:
      return function(std::int8_t{});
  }
}

inline bool fits(int channels) { return channels % kWidest == 0; }

void store_widest(CacheType type, const float* values, const float* scales, int channels, void* entry) {
  fits(channels) ? store_entry<kWidest>(type, values, scales, channels, entry)
                 : store_entry<kChannels>(type, values, scales, channels, entry);
}

void part_widest(const HeadQueries& head, std::int64_t first, std::int64_t count, const Partial& made) {
  with_type(head.type, [&](auto kind) {
    fits(head.channels) ? part<kWidest, decltype(kind)>(head, first, count, made)
                        : part<kChannels, decltype(kind)>(head, first, count, made);
  });
}

void tile_widest(const HeadQueries& head, std::int64_t first, int rows, float* y, void* memory) {
  with_type(head.type, [&](auto kind) {
    fits(head.channels) ? tile<kWidest, decltype(kind)>(head, first, rows, y, memory)
                        : tile<kChannels, decltype(kind)>(head, first, rows, y, memory);
  });
}

constexpr AttentionKernels kAttention = {store_widest, part_widest, Tile::bytes, tile_widest};

}  // namespace
}  // namespace dynexport::cpu
