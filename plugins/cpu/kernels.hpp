// The kernels of one instruction set, and the layouts that they read.
//
// A matrix [N, K] is cut into groups of 16 rows, the lanes of a vector; the last group is filled with zeros. Everything
// of a group lies in the order in which the kernels read it, so weights are used where the file has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynexport::cpu {

constexpr int kLanes = 16;
// Rows of activations that one pass over a group's weights serves.
constexpr int kMostRows = 16;

// A matrix in blocks of integers: weight = scale * (q - zero) + minimum, with one scale and minimum per row and block.
struct BlockMatrix {
  // [groups, blocks, size * bits / 32, lanes, 4]; 4 bits: a byte holds the values i (low) and i + 4 (high) of 8.
  const std::uint8_t* quantized;
  const void* scales;  // [groups, blocks, lanes], float32, or float16 where ``half``
  const void* minima;  // as scales; null: none
  bool half;
  int bits;  // 4 or 8
  int size;  // values per block, 16 or 32
  int zero;
  std::int64_t blocks;

  std::int64_t columns() const { return blocks * size; }
};

// Rows of activations rounded to int8 per block, x = scale * value. Rows r0.. of a tile of R lie together:
// values [K / 4, R, 4], the others [blocks, R]. Tiles are as ``next_tile`` cuts them.
struct Activations {
  std::int8_t* values;
  float* scales;
  float* sums;            // scale * the sum of a block's values
  std::int32_t* offsets;  // -zero * the sum of a block's values
};

// A matrix of 16-bit floats: [groups, K / 2, lanes, 2] for bfloat16, [groups, K, lanes] for float16.
struct HalfMatrix {
  const std::uint16_t* values;
  bool bfloat16;
  std::int64_t width;

  std::int64_t columns() const { return width; }
};

struct HalfKernels {
  // Brings the rows of one tile, x [rows, columns], into the form that ``tile`` reads: at most 4 bytes a value.
  void (*prepare)(const HalfMatrix& matrix, const float* x, int rows, void* prepared);
  // As ``block_tile``.
  void (*tile)(const HalfMatrix& matrix, std::int64_t group, const void* prepared, int rows, float* y,
               std::int64_t stride);
  // Widens one row: y [K].
  void (*row)(const HalfMatrix& matrix, std::int64_t row, float* y);
};

struct Kernels {
  const char* name;
  // Rounds the rows of one tile, x [rows, columns]; a row with NaN or infinity gets the scale NaN.
  void (*quantize)(const float* x, std::int64_t columns, int size, int zero, int rows, const Activations& tile);
  // y [rows, stride] of one tile and one group: writes 16 columns.
  void (*block_tile)(const BlockMatrix& matrix, std::int64_t group, const Activations& tile, int rows, float* y,
                     std::int64_t stride);
  // Dequantizes one row: y [K].
  void (*block_row)(const BlockMatrix& matrix, std::int64_t row, float* y);
  // y = x * weight / the root of the mean of x^2 + epsilon, all of ``size`` values.
  void (*norm)(const float* x, const float* weight, float epsilon, std::int64_t size, float* y);
  // y = gate * sigmoid(gate) * up, all of kLanes values.
  void (*gate)(const float* gate, const float* up, float* y);
  HalfKernels halves;
  // y[i] = row i of w [count, columns] times x [columns], in float32.
  void (*float_rows)(const float* w, std::int64_t columns, int count, const float* x, float* y);
};

// Rows of the next tile where ``left`` remain: 16, 12, 8 or fewer.
constexpr int next_tile(std::int64_t left) {
  if (left >= 16) return 16;
  if (left >= 12) return 12;
  return left >= 8 ? 8 : static_cast<int>(left);
}

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
// Products of bfloat16 by an instruction, which also needs activations rounded to bfloat16; for other types as kAvx512.
extern const HalfKernels kAvx512Bfloat16;
#endif

// The best kernels for this processor, or those that the environment's DYNEXPORT_CPU_KERNELS names; null where it names
// none that run here.
const Kernels* chosen_kernels();

}  // namespace dynexport::cpu
