// The kernels, written once for every instruction set: ``V`` has vectors of 16 lanes.
//
// Only for the files of one instruction set each: everything is in an anonymous namespace, and nothing of the standard
// library is used, so that the linker never takes a function with instructions that another processor lacks.
#pragma once

#include <cstring>

#include "kernels.hpp"
#include "tile_rows.hpp"

namespace dynexport::cpu {
namespace {

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float from_bfloat16(std::uint16_t half) { return from_bits(static_cast<std::uint32_t>(half) << 16); }

constexpr float kTiny = 1e-30F;  // below, 127 / x overflows

// The bits of a float's magnitude, as an integer: these have the order of the magnitudes, and infinity and NaN are
// above.
constexpr std::int32_t kInfinite = 0x7F800000;

template <class V>
void quantize_block(const float* x, int size, int zero, int rows, std::int8_t* values, float* scale, float* sum,
                    std::int32_t* offset) {
  using I = typename V::Integers;
  I largest = V::same(0);
  for (int i = 0; i < size; i += kLanes) largest = V::max(V::magnitude_bits(V::load(x + i)), largest);
  const std::int32_t bits = V::largest(largest);
  const float most = from_bits(static_cast<std::uint32_t>(bits));
  const bool usable = bits < kInfinite && most >= kTiny;
  const float factor = usable ? 127 / most : 0;
  I total = V::same(0);
  alignas(16) std::int8_t rounded[kLanes];
  for (int i = 0; i < size; i += kLanes) {
    if (usable)
      total = V::add(total, V::round(V::load(x + i), factor, rounded));
    else
      std::memset(rounded, 0, sizeof(rounded));
    for (int j = 0; j < kLanes / 4; ++j)
      std::memcpy(values + static_cast<std::ptrdiff_t>(i / 4 + j) * rows * 4, rounded + j * 4, 4);
  }
  const std::int32_t added = V::total(total);
  *scale = usable ? most / 127 : bits < kInfinite ? 0 : from_bits(kInfinite | 1);
  *sum = *scale * static_cast<float>(added);
  *offset = -zero * added;
}

template <class V>
void quantize(const float* x, std::int64_t columns, int size, int zero, int rows, const Activations& tile) {
  const std::int64_t blocks = columns / size;
  for (int r = 0; r < rows; ++r)
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t place = b * rows + r;
      quantize_block<V>(x + r * columns + b * size, size, zero, rows, tile.values + b * size * rows + r * 4,
                        tile.scales + place, tile.sums + place, tile.offsets + place);
    }
}

// The integers of one block of a group, and their products with a row of activations.
template <class V, int kBits, int kSize>
struct Weights {
  static constexpr int kChunks = kSize / 4;
  static constexpr int kBytes = kLanes * kSize * kBits / 8;
  typename V::Bytes chunks[kChunks];

  explicit Weights(const std::uint8_t* quantized) {
    for (int i = 0; i < kChunks; ++i) {
      if constexpr (kBits == 8) {
        chunks[i] = V::load(quantized + 64 * i);
      } else {
        const typename V::Bytes packed = V::load(quantized + 64 * (i / 2));
        chunks[i] = i % 2 ? V::high(packed) : V::low(packed);
      }
    }
  }

  typename V::Floats dot(const std::int8_t* values, int stride, std::int32_t offset) const {
    // Two chains, as an instruction waits for the one before.
    typename V::Integers even = V::same(offset), odd = V::same(0);
    for (int i = 0; i < kChunks; i += 2) {
      even = V::template dot<kBits>(even, chunks[i], values + static_cast<std::ptrdiff_t>(i) * stride);
      odd = V::template dot<kBits>(odd, chunks[i + 1], values + static_cast<std::ptrdiff_t>(i + 1) * stride);
    }
    return V::to_floats(V::add(even, odd));
  }
};

template <class V, int kBits, int kSize, class Scale, bool kMinima, int kRows>
void block_tile_of(const BlockMatrix& matrix, std::int64_t group, const Activations& tile, float* y,
                   std::int64_t stride) {
  using Block = Weights<V, kBits, kSize>;
  typename V::Floats sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = V::zeros();
  const std::uint8_t* quantized = matrix.quantized + group * matrix.blocks * Block::kBytes;
  const Scale* scales = static_cast<const Scale*>(matrix.scales) + group * matrix.blocks * kLanes;
  const Scale* minima = kMinima ? static_cast<const Scale*>(matrix.minima) + group * matrix.blocks * kLanes : nullptr;
  for (std::int64_t b = 0; b < matrix.blocks; ++b) {
    const Block weights(quantized + b * Block::kBytes);
    const typename V::Floats scale = V::load(scales + b * kLanes);
    const std::int8_t* values = tile.values + b * kSize * kRows;
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t place = b * kRows + r;
      const typename V::Floats product = weights.dot(values + r * 4, kRows * 4, tile.offsets[place]);
      sums[r] = V::fma(product, V::multiply(scale, tile.scales[place]), sums[r]);
    }
    if constexpr (kMinima) {
      const typename V::Floats minimum = V::load(minima + b * kLanes);
      for (int r = 0; r < kRows; ++r) sums[r] = V::fma(minimum, V::same(tile.sums[b * kRows + r]), sums[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) V::store(y + r * stride, sums[r]);
}

template <class V, int kBits, int kSize, class Scale, bool kMinima>
void block_tile_by_rows(const BlockMatrix& m, std::int64_t group, const Activations& tile, int rows, float* y,
                        std::int64_t stride) {
  with_rows(rows, [&](auto count) {
    block_tile_of<V, kBits, kSize, Scale, kMinima, decltype(count)::value>(m, group, tile, y, stride);
  });
}

template <class V, int kBits, int kSize>
void block_tile_by_scales(const BlockMatrix& m, std::int64_t group, const Activations& tile, int rows, float* y,
                          std::int64_t stride) {
  if (m.half && m.minima != nullptr)
    block_tile_by_rows<V, kBits, kSize, std::uint16_t, true>(m, group, tile, rows, y, stride);
  else if (m.half)
    block_tile_by_rows<V, kBits, kSize, std::uint16_t, false>(m, group, tile, rows, y, stride);
  else if (m.minima != nullptr)
    block_tile_by_rows<V, kBits, kSize, float, true>(m, group, tile, rows, y, stride);
  else
    block_tile_by_rows<V, kBits, kSize, float, false>(m, group, tile, rows, y, stride);
}

template <class V>
void block_tile(const BlockMatrix& m, std::int64_t group, const Activations& tile, int rows, float* y,
                std::int64_t stride) {
  if (m.bits == 4 && m.size == 32)
    block_tile_by_scales<V, 4, 32>(m, group, tile, rows, y, stride);
  else if (m.bits == 4)
    block_tile_by_scales<V, 4, 16>(m, group, tile, rows, y, stride);
  else if (m.size == 32)
    block_tile_by_scales<V, 8, 32>(m, group, tile, rows, y, stride);
  else
    block_tile_by_scales<V, 8, 16>(m, group, tile, rows, y, stride);
}

template <class V>
float scalar(const BlockMatrix& m, const void* values, std::int64_t place) {
  if (!m.half) return static_cast<const float*>(values)[place];
  return V::from_half(static_cast<const std::uint16_t*>(values)[place]);
}

template <class V>
void block_row(const BlockMatrix& m, std::int64_t row, float* y) {
  const std::int64_t group = row / kLanes, lane = row % kLanes;
  const std::int64_t bytes = static_cast<std::int64_t>(kLanes) * m.size * m.bits / 8;
  for (std::int64_t b = 0; b < m.blocks; ++b) {
    const std::int64_t block = group * m.blocks + b;
    const std::uint8_t* of_lane = m.quantized + block * bytes + lane * 4;
    const float scale = scalar<V>(m, m.scales, block * kLanes + lane);
    const float minimum = m.minima == nullptr ? 0 : scalar<V>(m, m.minima, block * kLanes + lane);
    for (int i = 0; i < m.size; ++i) {
      const int byte = m.bits == 8 ? of_lane[i / 4 * 64 + i % 4] : of_lane[i / 8 * 64 + i % 4];
      const int q = m.bits == 8 ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
      y[b * m.size + i] = scale * static_cast<float>(q - m.zero) + minimum;
    }
  }
}

// The order that half_tile reads: [columns, rows].
inline void interleave(const HalfMatrix& m, const float* x, int rows, void* prepared) {
  float* const tile = static_cast<float*>(prepared);
  for (int r = 0; r < rows; ++r)
    for (std::int64_t k = 0; k < m.columns(); ++k) tile[k * rows + r] = x[r * m.columns() + k];
}

template <class V, bool kBfloat16, int kRows>
void half_tile_of(const HalfMatrix& m, std::int64_t group, const float* tile, float* y, std::int64_t stride) {
  // Two sums a row where there are few, as an instruction waits for the one before.
  typename V::Floats sums[kRows], more[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = more[r] = V::zeros();
  const std::uint16_t* values = m.values + group * m.columns() * kLanes;
  for (std::int64_t k = 0; k + 1 < m.columns(); k += 2) {
    typename V::Floats first, second;
    V::template load_pair<kBfloat16>(values + k * kLanes, &first, &second);
    for (int r = 0; r < kRows; ++r) {
      typename V::Floats& other = kRows < 8 ? more[r] : sums[r];
      sums[r] = V::fma(first, V::same(tile[k * kRows + r]), sums[r]);
      other = V::fma(second, V::same(tile[(k + 1) * kRows + r]), other);
    }
  }
  for (int r = 0; r < kRows; ++r) V::store(y + r * stride, V::add(sums[r], more[r]));
}

template <class V, bool kBfloat16>
void half_tile_by_rows(const HalfMatrix& m, std::int64_t group, const float* tile, int rows, float* y,
                       std::int64_t stride) {
  with_rows(rows, [&](auto count) { half_tile_of<V, kBfloat16, decltype(count)::value>(m, group, tile, y, stride); });
}

template <class V>
void half_tile(const HalfMatrix& m, std::int64_t group, const void* prepared, int rows, float* y, std::int64_t stride) {
  const float* const tile = static_cast<const float*>(prepared);
  if (m.bfloat16)
    half_tile_by_rows<V, true>(m, group, tile, rows, y, stride);
  else
    half_tile_by_rows<V, false>(m, group, tile, rows, y, stride);
}

template <class V>
void half_row(const HalfMatrix& m, std::int64_t row, float* y) {
  const std::uint16_t* values = m.values + row / kLanes * m.columns() * kLanes;
  const std::int64_t lane = row % kLanes;
  for (std::int64_t k = 0; k < m.columns(); ++k)
    y[k] = m.bfloat16 ? from_bfloat16(values[k / 2 * 2 * kLanes + lane * 2 + k % 2])
                      : V::from_half(values[k * kLanes + lane]);
}

template <class V, int kCount>
void float_rows_of(const float* w, std::int64_t columns, const float* x, float* y) {
  typename V::Floats sums[kCount];
  for (int i = 0; i < kCount; ++i) sums[i] = V::zeros();
  std::int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const typename V::Floats part = V::load(x + k);
    for (int i = 0; i < kCount; ++i) sums[i] = V::fma(V::load(w + i * columns + k), part, sums[i]);
  }
  for (int i = 0; i < kCount; ++i) {
    float sum = V::total(sums[i]);
    for (std::int64_t rest = k; rest < columns; ++rest) sum += w[i * columns + rest] * x[rest];
    y[i] = sum;
  }
}

template <class V>
void float_rows(const float* w, std::int64_t columns, int count, const float* x, float* y) {
  constexpr int kAtOnce = 8;  // chains of sums, as an instruction waits for the one before
  int i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) float_rows_of<V, kAtOnce>(w + i * columns, columns, x, y + i);
  for (; i < count; ++i) float_rows_of<V, 1>(w + i * columns, columns, x, y + i);
}

// The values of x from i on, as many as there are, and zeros.
template <class V>
typename V::Floats load_some(const float* x, std::int64_t i, std::int64_t size) {
  if (i + kLanes <= size) return V::load(x + i);
  float some[kLanes] = {};
  std::memcpy(some, x + i, static_cast<std::size_t>(size - i) * sizeof(float));
  return V::load(some);
}

template <class V>
void norm(const float* x, const float* weight, float epsilon, std::int64_t size, float* y) {
  typename V::Floats squares = V::zeros();
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const typename V::Floats part = load_some<V>(x, i, size);
    squares = V::fma(part, part, squares);
  }
  const float factor = 1 / __builtin_sqrtf(V::total(squares) / static_cast<float>(size) + epsilon);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const auto scaled = V::multiply(load_some<V>(x, i, size), factor);
    const auto normed = V::multiply(scaled, load_some<V>(weight, i, size));
    if (i + kLanes <= size) {
      V::store(y + i, normed);
    } else {
      float some[kLanes];
      V::store(some, normed);
      std::memcpy(y + i, some, static_cast<std::size_t>(size - i) * sizeof(float));
    }
  }
}

// e^x for x up to 88; below -87, that of -87.
template <class V>
typename V::Floats exponential(typename V::Floats x) {
  const auto of = [](float value) { return V::same(value); };
  x = V::max(V::min(x, of(88)), of(-87));
  const auto power = V::nearest(V::multiply(x, 1.44269504F));
  auto rest = V::fma(power, of(-0.693359375F), x);
  rest = V::fma(power, of(2.12194440e-4F), rest);
  auto y = of(1.9875691500e-4F);
  constexpr float kRest[] = {1.3981999507e-3F, 8.3334519073e-3F, 4.1665795894e-2F, 1.6666665459e-1F, 0.5F, 1, 1};
  for (const float coefficient : kRest) y = V::fma(y, rest, of(coefficient));
  return V::times_power(y, power);
}

template <class V>
void gate(const float* gate, const float* up, float* y) {
  const auto x = V::load(gate);
  const auto below = V::add(V::same(1.0F), exponential<V>(V::multiply(x, -1.0F)));
  V::store(y, V::multiply(V::divide(x, below), V::load(up)));
}

template <class V>
constexpr Kernels kernels(const char* name) {
  return {name, quantize<V>, block_tile<V>, block_row<V>, norm<V>, gate<V>, {interleave, half_tile<V>, half_row<V>}, float_rows<V>};
}

}  // namespace
}  // namespace dynexport::cpu
