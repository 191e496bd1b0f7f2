// The rows of a tile as a constant: the kernels are compiled for every number that ``next_tile`` returns.
//
// As products.hpp: only for the files of one instruction set each.
#pragma once

namespace dynexport::cpu {
namespace {

template <int kRows>
struct TileRows {
  static constexpr int value = kRows;
};

// Calls multiply(TileRows<rows>()).
template <class Multiply>
void with_rows(int rows, const Multiply& multiply) {
  switch (rows) {
    case 16:
      return multiply(TileRows<16>());
    case 12:
      return multiply(TileRows<12>());
    case 8:
      return multiply(TileRows<8>());
    case 7:
      return multiply(TileRows<7>());
    case 6:
      return multiply(TileRows<6>());
    case 5:
      return multiply(TileRows<5>());
    case 4:
      return multiply(TileRows<4>());
    case 3:
      return multiply(TileRows<3>());
    case 2:
      return multiply(TileRows<2>());
    default:
      return multiply(TileRows<1>());
  }
}

}  // namespace
}  // namespace dynexport::cpu
