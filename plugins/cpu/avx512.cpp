// The kernels with AVX-512 and its products of bytes (VNNI).
#include <immintrin.h>

#include "products.hpp"

namespace dynexport::cpu {
namespace {

struct Avx512 {
  using Floats = __m512;
  using Integers = __m512i;
  using Bytes = __m512i;

  static Floats zeros() { return _mm512_setzero_ps(); }
  static Floats same(float value) { return _mm512_set1_ps(value); }
  static Integers same(std::int32_t value) { return _mm512_set1_epi32(value); }
  static Floats load(const float* values) { return _mm512_loadu_ps(values); }
  static Floats load(const std::uint16_t* halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
  }
  static Bytes load(const std::uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
  static Bytes low(Bytes packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
  static Bytes high(Bytes packed) { return low(_mm512_srli_epi16(packed, 4)); }
  static Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats to_floats(Integers values) { return _mm512_cvtepi32_ps(values); }
  static Floats multiply(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats nearest(Floats values) { return _mm512_roundscale_ps(values, 0); }
  static Floats times_power(Floats values, Floats power) { return _mm512_scalef_ps(values, power); }
  static Integers magnitude_bits(Floats values) {
    return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7FFFFFFF));
  }
  static Integers max(Integers a, Integers b) { return _mm512_max_epi32(a, b); }
  static std::int32_t largest(Integers values) { return _mm512_reduce_max_epi32(values); }
  static std::int32_t total(Integers values) { return _mm512_reduce_add_epi32(values); }
  static float total(Floats values) { return _mm512_reduce_add_ps(values); }

  template <int kBits>
  static Integers dot(Integers sum, Bytes weights, const std::int8_t* four) {
    std::int32_t values;
    std::memcpy(&values, four, sizeof(values));
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(values));
  }

  // Writes the rounded values, and returns them.
  static Integers round(Floats values, float factor, std::int8_t* to) {
    const __m512i rounded = _mm512_cvtps_epi32(multiply(values, factor));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(rounded));
    return rounded;
  }

  template <bool kBfloat16>
  static void load_pair(const std::uint16_t* values, Floats* first, Floats* second) {
    if constexpr (kBfloat16) {
      const __m512i both = _mm512_loadu_si512(values);
      *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000U))));
    } else {
      *first = load(values);
      *second = load(values + kLanes);
    }
  }

  static float from_half(std::uint16_t half) { return _cvtsh_ss(half); }
};

}  // namespace

extern const Kernels kAvx512 = kernels<Avx512>("avx512-vnni");

}  // namespace dynexport::cpu
