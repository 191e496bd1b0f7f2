// Largest value, exponentials and sums of a row.
#include "generation/row_math.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

namespace dynexport {
namespace {

// Numbers in a vector of the plainest machines.
constexpr std::size_t kLanes = 4;
// Numbers that are searched at a time.
constexpr std::size_t kPart = 1024;

// Returns exp of a number that is not above 0, with an error of about one unit in the last place; 0 below -87, where
// float32 has no normal numbers left. Without branches or calls, so that loops over it become vector instructions.
inline float exp_of(float value) {
  constexpr float kLeast = -87.0F, kLog2E = 1.44269504F, kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = value > kLeast ? value : kLeast;
  const float shifted = bounded * kLog2E + kRound;
  const float whole = shifted - kRound;
  const float rest = (bounded - whole * kLn2High) - whole * kLn2Low;
  float sum = 1.9875691500e-4F;
  sum = sum * rest + 1.3981999507e-3F;
  sum = sum * rest + 8.3334519073e-3F;
  sum = sum * rest + 4.1665795894e-2F;
  sum = sum * rest + 1.6666665459e-1F;
  sum = sum * rest + 5.0000001201e-1F;
  sum = sum * rest * rest + rest + 1.0F;
  std::int32_t bits = 0;
  std::memcpy(&bits, &shifted, sizeof bits);
  const std::int32_t scale_bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(bits - 0x4B400000 + 127) << 23U);
  float scale = 0.0F;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return value > kLeast ? sum * scale : 0.0F;
}

struct Largest {
  float value;
  bool nan;  // whether a number is NaN; the value is undefined then
};

Largest largest_of(Row row) {
  using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
  using Marks = std::int32_t __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
  Lanes largest = Lanes{} - INFINITY;
  Marks nan{};
  const std::size_t whole = row.size / kLanes * kLanes;
  for (std::size_t start = 0; start < whole; start += kLanes) {
    Lanes values;
    std::memcpy(&values, row.values + start, sizeof values);
    largest = values > largest ? values : largest;
    nan |= values != values;
  }
  Largest found{-INFINITY, false};
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    found.value = std::max(found.value, largest[lane]);
    found.nan = found.nan || nan[lane] != 0;
  }
  for (std::size_t place = whole; place < row.size; ++place) {
    found.value = std::max(found.value, row[place]);
    found.nan = found.nan || std::isnan(row[place]);
  }
  return found;
}

}  // namespace

std::size_t first_largest(Row row) {
  const float* found = row.values;
  for (std::size_t start = 0; start < row.size; start += kPart) {
    const Row part{row.values + start, std::min(kPart, row.size - start)};
    const Largest largest = largest_of(part);
    const float* end = part.values + part.size;
    if (largest.nan) {
      found = std::find_if(part.values, end, [](float value) { return std::isnan(value); });
      break;
    }
    if (largest.value > *found || start == 0) found = std::find(part.values, end, largest.value);
  }
  return static_cast<std::size_t>(found - row.values);
}

std::vector<float> weights_of(Row row, float largest, float temperature) {
  std::vector<float> weights((row.size + kBlock - 1) / kBlock * kBlock, 0.0F);
  float* out = weights.data();
  if (temperature == 1.0F) {
    for (std::size_t place = 0; place < row.size; ++place) out[place] = exp_of(row.values[place] - largest);
  } else {
    for (std::size_t place = 0; place < row.size; ++place) {
      out[place] = exp_of((row.values[place] - largest) / temperature);
    }
  }
  return weights;
}

std::vector<double> block_sums(const std::vector<float>& weights) {
  std::vector<double> sums(weights.size() / kBlock);
  for (std::size_t block = 0; block < sums.size(); ++block) {
    std::array<float, kLanes> lanes{};
    const float* values = weights.data() + block * kBlock;
    for (std::size_t start = 0; start < kBlock; start += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[start + lane];
    }
    sums[block] = std::accumulate(lanes.begin(), lanes.end(), 0.0);
  }
  return sums;
}

double log_of_sum(Row row, float largest) {
  const std::vector<double> sums = block_sums(weights_of(row, largest, 1.0F));
  return static_cast<double>(largest) + std::log(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace dynexport
