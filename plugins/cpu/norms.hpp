// RMSNorm of one row.
#pragma once

#include <cmath>
#include <cstdint>

namespace dynexport::cpu {

// y = x / sqrt(mean(x * x) + epsilon) * weight
inline void rms_norm(const float* x, const float* weight, float epsilon, std::int64_t size, float* y) {
  constexpr int kSums = 16;  // side by side, so that a compiler may add vectors
  float sums[kSums] = {};
  std::int64_t k = 0;
  for (; k + kSums <= size; k += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += x[k + i] * x[k + i];
  float total = 0;
  for (; k < size; ++k) total += x[k] * x[k];
  for (const float sum : sums) total += sum;
  const float factor = 1 / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (k = 0; k < size; ++k) y[k] = x[k] * factor * weight[k];
}

}  // namespace dynexport::cpu
