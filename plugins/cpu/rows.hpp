// What all products, and all gathers of rows, have in common.
#pragma once

#include <algorithm>
#include <cstring>

#include "context.hpp"
#include "kernels.hpp"

namespace dynexport::cpu {

// The kernels that run; throws where the environment asks for others than this processor has.
const Kernels& needed_kernels();

// One product y [.., N] = x [.., K] W^T: cuts the rows of x into tiles and W into groups, and shares these out.
class Product {
 public:
  // Checks x, input 0, and makes y.
  Product(const Ort::KernelContext& context, std::int64_t columns, std::int64_t results);

  const float* x() const { return x_; }
  float* y() const { return y_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t results() const { return results_; }

  // The product of some of the rows.
  Product of_rows(std::int64_t first, std::int64_t count) const {
    Product part = *this;
    part.x_ += first * columns_;
    part.y_ += first * results_;
    part.rows_ = count;
    return part;
  }

  // Calls of_tile(first row, rows) for every tile.
  template <class Function>
  void prepare(const Function& of_tile) const {
    if (rows_ < kMostRows) {
      for_tiles(0, rows_, of_tile);
      return;
    }
    const std::int64_t parts = (rows_ + kMostRows - 1) / kMostRows;
    for_each(context_, parts, rows_ * columns_ * 8,
             [&](std::int64_t part) { for_tiles(part * kMostRows, std::min(rows_, (part + 1) * kMostRows), of_tile); });
  }

  // Calls of_tile(group, first row, rows, y, its stride) for every tile and group.
  template <class Function>
  void multiply(const Function& of_tile) const {
    constexpr std::int64_t kRowsOfPart = 256;  // their activations stay in the cache of a core
    const std::int64_t groups = (results_ + kLanes - 1) / kLanes, parts = (rows_ + kRowsOfPart - 1) / kRowsOfPart;
    for_each(context_, groups * parts, rows_ * columns_ * results_, [&](std::int64_t i) {
      const std::int64_t part = parts == 1 ? 0 : i / groups, group = i - part * groups;  // a division takes its time
      const std::int64_t column = group * kLanes, begin = part * kRowsOfPart;
      const std::int64_t width = std::min<std::int64_t>(kLanes, results_ - column);
      for_tiles(begin, std::min(rows_, begin + kRowsOfPart), [&](std::int64_t first, int count) {
        float* const y = y_ + first * results_ + column;
        if (width == kLanes) {
          of_tile(group, first, count, y, results_);
          return;
        }
        float whole[kMostRows * kLanes];
        of_tile(group, first, count, whole, kLanes);
        for (int r = 0; r < count; ++r)
          std::memcpy(y + r * results_, whole + r * kLanes, static_cast<std::size_t>(width) * sizeof(float));
      });
    });
  }

 private:
  template <class Function>
  static void for_tiles(std::int64_t begin, std::int64_t end, const Function& of_tile) {
    for (std::int64_t first = begin; first < end;) {
      const int count = next_tile(end - first);
      of_tile(first, count);
      first += count;
    }
  }

  const Ort::KernelContext& context_;
  std::int64_t columns_, results_, rows_;
  const float* x_;
  float* y_;
};

// Writes rows of a matrix [rows, columns] at the indices of input 0; as in ONNX, -1 is the last row.
template <class Function>
void gather(const Ort::KernelContext& context, std::int64_t columns, std::int64_t rows, const Function& write_row) {
  const Tensor indices = tensor_of(context.GetInput(0));
  Shape shape = indices.shape;
  const std::int64_t count = product(shape, 0, shape.size());
  shape.push_back(columns);
  float* const y = context.GetOutput(0, shape).GetTensorMutableData<float>();
  const auto* const at = static_cast<const std::int64_t*>(indices.data);
  for (std::int64_t i = 0; i < count; ++i)
    if (at[i] < -rows || at[i] >= rows)
      refuse("indices", std::to_string(-rows) + ".." + std::to_string(rows - 1), std::to_string(at[i]));
  for_each(context, count, count * columns * 8,
           [&](std::int64_t i) { write_row(at[i] < 0 ? at[i] + rows : at[i], y + i * columns); });
}

}  // namespace dynexport::cpu
