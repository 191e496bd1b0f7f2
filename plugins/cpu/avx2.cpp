// The kernels with AVX2, FMA and F16C.
#include <immintrin.h>

#include "products.hpp"

namespace dynexport::cpu {
namespace {

struct Avx2 {
  struct Floats {
    __m256 a, b;
  };
  struct Integers {
    __m256i a, b;
  };
  using Bytes = Integers;

  static Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Floats same(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Integers same(std::int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static Floats load(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
  static Floats load(const std::uint16_t* halves) { return {eight(halves), eight(halves + 8)}; }
  static Bytes load(const std::uint8_t* bytes) { return {bits(bytes), bits(bytes + 32)}; }
  static void store(float* to, Floats values) {
    _mm256_storeu_ps(to, values.a);
    _mm256_storeu_ps(to + 8, values.b);
  }
  static Bytes low(Bytes packed) { return {nibbles(packed.a), nibbles(packed.b)}; }
  static Bytes high(Bytes packed) {
    return {nibbles(_mm256_srli_epi16(packed.a, 4)), nibbles(_mm256_srli_epi16(packed.b, 4))};
  }
  static Integers add(Integers x, Integers y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static Floats to_floats(Integers values) { return {_mm256_cvtepi32_ps(values.a), _mm256_cvtepi32_ps(values.b)}; }
  static Floats multiply(Floats x, float y) {
    return {_mm256_mul_ps(x.a, _mm256_set1_ps(y)), _mm256_mul_ps(x.b, _mm256_set1_ps(y))};
  }
  static Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static Floats multiply(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static Floats divide(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static Floats nearest(Floats values) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(values.a, kNearest), _mm256_round_ps(values.b, kNearest)};
  }
  static Floats times_power(Floats values, Floats power) {
    return {_mm256_mul_ps(values.a, power_of_two(power.a)), _mm256_mul_ps(values.b, power_of_two(power.b))};
  }
  static Integers magnitude_bits(Floats values) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    return {_mm256_and_si256(_mm256_castps_si256(values.a), mask),
            _mm256_and_si256(_mm256_castps_si256(values.b), mask)};
  }
  static Integers max(Integers x, Integers y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static std::int32_t largest(Integers values) {
    const __m256i eight = _mm256_max_epi32(values.a, values.b);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 1)));
  }
  static std::int32_t total(Integers values) {
    const __m256i eight = _mm256_add_epi32(values.a, values.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
  }
  static float total(Floats values) {
    const __m256 eight = _mm256_add_ps(values.a, values.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  template <int kBits>
  static Integers dot(Integers sum, Bytes weights, const std::int8_t* four) {
    std::int32_t values;
    std::memcpy(&values, four, sizeof(values));
    const __m256i x = _mm256_set1_epi32(values);
    return {dot_of<kBits>(sum.a, weights.a, x), dot_of<kBits>(sum.b, weights.b, x)};
  }

  static Integers round(Floats values, float factor, std::int8_t* to) {
    const Floats scaled = multiply(values, factor);
    const __m256i a = _mm256_cvtps_epi32(scaled.a), b = _mm256_cvtps_epi32(scaled.b);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), bytes);
    return {a, b};
  }

  template <bool kBfloat16>
  static void load_pair(const std::uint16_t* values, Floats* first, Floats* second) {
    if constexpr (kBfloat16) {
      const Bytes both = load(reinterpret_cast<const std::uint8_t*>(values));
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000U));
      *first = {_mm256_castsi256_ps(_mm256_slli_epi32(both.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(both.b, 16))};
      *second = {_mm256_castsi256_ps(_mm256_and_si256(both.a, upper)),
                 _mm256_castsi256_ps(_mm256_and_si256(both.b, upper))};
    } else {
      *first = load(values);
      *second = load(values + kLanes);
    }
  }

  static float from_half(std::uint16_t half) { return _cvtsh_ss(half); }

 private:
  static __m256 power_of_two(__m256 power) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static __m256 eight(const std::uint16_t* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  }
  static __m256i bits(const std::uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
  static __m256i nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

  // The instruction adds two products in 16 bits, which 8-bit weights could exceed: these are multiplied in two halves.
  template <int kBits>
  static __m256i dot_of(__m256i sum, __m256i weights, __m256i x) {
    if constexpr (kBits == 4) {
      const __m256i pairs = _mm256_maddubs_epi16(weights, x);
      return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
      const __m256i low = _mm256_maddubs_epi16(nibbles(weights), x);
      const __m256i high = _mm256_maddubs_epi16(nibbles(_mm256_srli_epi16(weights, 4)), x);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
  }
};

}  // namespace

extern const Kernels kAvx2 = kernels<Avx2>("avx2");

}  // namespace dynexport::cpu
