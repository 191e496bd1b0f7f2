// Arithmetic over a whole row of logits, in loops that compilers turn into vector instructions.
#pragma once

#include <cstddef>
#include <vector>

namespace dynexport {

// Numbers of a row, float32 [size].
struct Row {
  const float* values = nullptr;
  std::size_t size = 0;

  float operator[](std::size_t place) const { return values[place]; }
};

// Weights are padded with zeros to a whole number of blocks.
constexpr std::size_t kBlock = 64;

// Returns the index of the largest number, the first of several; that of a NaN if there is one. The row is not empty.
std::size_t first_largest(Row row);

// Returns exp((value - largest) / temperature) of each value, in float32.
std::vector<float> weights_of(Row row, float largest, float temperature);

// Returns the sums of blocks of weights.
std::vector<double> block_sums(const std::vector<float>& weights);

// Returns log(sum(exp(values))) of a row whose largest value is finite.
double log_of_sum(Row row, float largest);

}  // namespace dynexport
