// The rows of activations that a node reads and writes, and the kernels that run on them.
#pragma once

#include <cstring>

#include "context.hpp"
#include "kernels.hpp"

namespace dynexport::cpu {

// The kernels that run; throws where the environment asks for others than this processor has.
const Kernels& needed_kernels();

// The attribute N, the rows of a matrix.
std::int64_t rows_of_matrix(const Ort::ConstKernelInfo& info, const char* name = "N");

// An input float32 [.., columns].
struct Activated {
  Shape shape;
  std::int64_t rows;
  const float* data;
};
Activated activated(const Ort::KernelContext& context, std::size_t input, const char* name, std::int64_t columns);

// The weights of a norm, input float32 [columns].
const float* norm_weights(const Ort::KernelContext& context, std::size_t input, std::int64_t columns);

// The output, float32 [.., columns] with as many rows.
float* output_like(const Ort::KernelContext& context, const Activated& x, std::int64_t columns);

// Calls put(r, tile of 16 values, where they belong, how many of them) for every row of a product's group, where
// multiply(tile, stride) has written the rows: the last group of a matrix may have fewer columns than 16.
template <class Multiply, class Put>
void for_group(float* y, std::int64_t columns, std::int64_t group, int rows, const Multiply& multiply, const Put& put) {
  float tile[kMostRows * kLanes];
  multiply(tile, kLanes);
  const std::int64_t column = group * kLanes, left = columns - column;
  const int width = left < kLanes ? static_cast<int>(left) : kLanes;
  for (int r = 0; r < rows; ++r) put(r, tile + r * kLanes, y + r * columns + column, width);
}

}  // namespace dynexport::cpu
