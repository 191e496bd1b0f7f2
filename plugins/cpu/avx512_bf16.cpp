// Products of bfloat16 with AVX-512's instruction for them: two of a row at once, for 16 rows of weights.
#include <immintrin.h>

#include <cstring>

#include "kernels.hpp"
#include "tile_rows.hpp"

namespace dynexport::cpu {
namespace {

void prepare(const HalfMatrix& m, const float* x, int rows, void* prepared) {
  if (!m.bfloat16) {
    kAvx512.halves.prepare(m, x, rows, prepared);
    return;
  }
  // [columns / 2, rows, 2]
  auto* const pairs = static_cast<std::uint32_t*>(prepared);
  for (int r = 0; r < rows; ++r)
    for (std::int64_t k = 0; k < m.columns(); k += 16) {
      const std::int64_t left = m.columns() - k;
      const __mmask16 mask = left < 16 ? static_cast<__mmask16>((1U << left) - 1) : 0xFFFF;
      alignas(32) std::uint32_t rounded[8];
      const __m256bh halves = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + r * m.columns() + k));
      std::memcpy(rounded, &halves, sizeof(rounded));
      for (std::int64_t i = 0; i < (left < 16 ? left / 2 : 8); ++i) pairs[(k / 2 + i) * rows + r] = rounded[i];
    }
}

template <int kRows>
void tile_of(const HalfMatrix& m, std::int64_t group, const std::uint32_t* pairs, float* y, std::int64_t stride) {
  // Several sums a row where there are few rows, as an instruction waits for the one before.
  constexpr int kChains = kRows >= 8 ? 1 : 4;
  __m512 sums[kChains][kRows];
  for (auto& chain : sums)
    for (__m512& sum : chain) sum = _mm512_setzero_ps();
  const std::uint16_t* const values = m.values + group * m.columns() * kLanes;
  const std::int64_t count = m.columns() / 2, whole = count - count % kChains;
  const auto add = [&](std::int64_t pair, __m512* chain) {
    const __m512i weights = _mm512_loadu_si512(values + pair * 2 * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(pairs[pair * kRows + r]));
      chain[r] = _mm512_dpbf16_ps(chain[r], reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
    }
  };
  for (std::int64_t pair = 0; pair < whole; pair += kChains)
    for (int i = 0; i < kChains; ++i) add(pair + i, sums[i]);
  for (std::int64_t pair = whole; pair < count; ++pair) add(pair, sums[0]);
  for (int r = 0; r < kRows; ++r) {
    for (int i = 1; i < kChains; ++i) sums[0][r] = _mm512_add_ps(sums[0][r], sums[i][r]);
    _mm512_storeu_ps(y + r * stride, sums[0][r]);
  }
}

void tile(const HalfMatrix& m, std::int64_t group, const void* prepared, int rows, float* y, std::int64_t stride) {
  if (!m.bfloat16) {
    kAvx512.halves.tile(m, group, prepared, rows, y, stride);
    return;
  }
  const auto* const pairs = static_cast<const std::uint32_t*>(prepared);
  with_rows(rows, [&](auto count) { tile_of<decltype(count)::value>(m, group, pairs, y, stride); });
}

void row(const HalfMatrix& m, std::int64_t index, float* y) { kAvx512.halves.row(m, index, y); }

}  // namespace

extern const HalfKernels kAvx512Bfloat16 = {prepare, tile, row};

}  // namespace dynexport::cpu
