// Vectors of L floats in the compiler's own notation, which becomes the instructions that a file is compiled for.
//
// As products.hpp: only for the files of one instruction set each.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dynexport::cpu {
namespace {

struct Half {
  std::uint16_t bits;
};

template <int L>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * L)));
  typedef std::int32_t Integers __attribute__((vector_size(4 * L)));
  typedef std::int8_t Bytes __attribute__((vector_size(L)));
};
template <int L>
using Floats = typename Vector<L>::Floats;
template <int L>
using Integers = typename Vector<L>::Integers;

template <int L>
inline Floats<L> all(float value) {
  return Floats<L>{} + value;
}

template <int L>
inline Floats<L> load(const float* values) {
  Floats<L> loaded;
  std::memcpy(&loaded, values, sizeof(loaded));
  return loaded;
}

// Compilers widen bytes in several steps on their own.
template <int L>
inline Floats<L> load(const std::int8_t* values) {
#if defined(__AVX512F__)
  if constexpr (L == 16)
    return (Floats<L>)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
  else
#endif
#if defined(__AVX2__)
      if constexpr (L == 8)
    return (Floats<L>)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
  else
#endif
  {
    typename Vector<L>::Bytes bytes;
    std::memcpy(&bytes, values, sizeof(bytes));
    return __builtin_convertvector(__builtin_convertvector(bytes, Integers<L>), Floats<L>);
  }
}

template <int L>
inline Floats<L> load(const Half* values) {
#if defined(__AVX512F__)
  if constexpr (L == 16)
    return (Floats<L>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  else
#endif
#if defined(__F16C__)
    return (Floats<L>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
#else
  _Float16 halves[L];
  std::memcpy(halves, values, sizeof(halves));
  Floats<L> loaded;
  for (int i = 0; i < L; ++i) loaded[i] = static_cast<float>(halves[i]);
  return loaded;
#endif
}

template <int L>
inline void store(float* to, Floats<L> values) {
  std::memcpy(to, &values, sizeof(values));
}

template <int L>
inline void store(Half* to, Floats<L> values) {
#if defined(__AVX512F__)
  if constexpr (L == 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
  else
#endif
#if defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < L; ++i) {
    const auto half = static_cast<_Float16>(values[i]);
    std::memcpy(to + i, &half, sizeof(half));
  }
#endif
}

template <int L>
inline Floats<L> larger(Floats<L> a, Floats<L> b) {
  return a > b ? a : b;
}

// Adding and subtracting this leaves a value below 2^22 rounded to the nearest, halves to even.
constexpr float kRounder = 12582912.0F;

template <int L>
inline void store(std::int8_t* to, Floats<L> values) {
  const Floats<L> most = all<L>(127), least = all<L>(-128);
  const Floats<L> within = values > most ? most : values < least ? least : values;
  const Floats<L> rounded = (within + kRounder) - kRounder;
  const auto bytes = __builtin_convertvector(__builtin_convertvector(rounded, Integers<L>), typename Vector<L>::Bytes);
  std::memcpy(to, &bytes, sizeof(bytes));
}

// exp(x) for x <= 0 to two units in the last place; 0 below -87.
template <int L>
inline Floats<L> exponential(Floats<L> x) {
  const Floats<L> least = all<L>(-87.0F);
  const Floats<L> bounded = x < least ? least : x;
  const Floats<L> biased = bounded * 1.44269504F + kRounder;
  const Floats<L> n = biased - kRounder;
  const Floats<L> r = bounded - n * 0.693359375F - n * -2.12194440e-4F;
  Floats<L> y = r * 1.9875691500e-4F + 1.3981999507e-3F;
  y = y * r + 8.3334519073e-3F;
  y = y * r + 4.1665795894e-2F;
  y = y * r + 1.6666665459e-1F;
  y = y * r + 5.0000001201e-1F;
  y = y * r * r + r + 1.0F;
  const Integers<L> exponent = ((Integers<L>)biased - 0x4B400000) << 23;
  const Floats<L> scaled = (Floats<L>)((Integers<L>)y + exponent);
  return x < least ? Floats<L>{} : x == x ? scaled : x;
}

// c * tanh(x / c).
template <int L>
inline Floats<L> capped(Floats<L> x, float c) {
  const Floats<L> twice = x * (2 / c), down = twice > 0.0F ? -twice : twice;
  const Floats<L> e = exponential<L>(down);
  const Floats<L> tanh = (1.0F - e) / (1.0F + e);
  return (twice > 0.0F ? tanh : -tanh) * c;
}

// The sums of neighbours: in each four lanes, two of a and two of b.
template <int L>
inline Floats<L> pairs(Floats<L> a, Floats<L> b) {
  if constexpr (L == 16)
    return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  else if constexpr (L == 8)
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}

// The totals of four vectors.
template <int L>
inline Floats<4> totals(const Floats<L>* four) {
  const Floats<L> each = pairs<L>(pairs<L>(four[0], four[1]), pairs<L>(four[2], four[3]));
  if constexpr (L == 16) {
    const Floats<8> half = __builtin_shufflevector(each, each, 0, 1, 2, 3, 4, 5, 6, 7) +
                           __builtin_shufflevector(each, each, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else if constexpr (L == 8) {
    return __builtin_shufflevector(each, each, 0, 1, 2, 3) + __builtin_shufflevector(each, each, 4, 5, 6, 7);
  } else {
    return each;
  }
}

template <int L>
inline float largest(Floats<L> values) {
  float most = values[0];
  for (int i = 1; i < L; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

template <int L>
inline float total(Floats<L> values) {
  float sum = 0;
  for (int i = 0; i < L; ++i) sum += values[i];
  return sum;
}

}  // namespace
}  // namespace dynexport::cpu
