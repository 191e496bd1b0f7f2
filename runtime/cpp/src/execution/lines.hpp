// Lines of tokens: arrays [n, width] whose rows are gathered and scattered by indices.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "execution/arrays.hpp"

namespace dynexport {

using Indices = std::vector<std::int64_t>;
// A layer, a place or a row, each with the indices of its tokens.
using Groups = std::vector<std::pair<std::int64_t, Indices>>;

// The elements of ``values`` at some indices.
Indices chosen_of(const Indices& values, const Indices& indices);
// 0..count-1.
Indices counted_to(std::int64_t count);
// Every value with the indices where it stands, ascending.
Groups grouped(const Indices& values);

// Returns rows of an array [n, width] as an array of another shape with as many elements.
Array gathered(const Array& from, const std::vector<std::int64_t>& rows, std::vector<std::int64_t> shape);

// Writes the rows of a result into some rows of an array [n, width]. Throws Error unless the result has as many
// elements of the array's type; ``what`` is named in the error.
void scatter(const Tensor& result, const std::vector<std::int64_t>& rows, Array& into, const std::string& what);

// An uninitialized array [n, width] for rows of a result whose last dimension is the width.
Array lines_like(const Tensor& result, std::int64_t n);

// The last dimension of an array.
std::int64_t width_of(const Array& lines);

}  // namespace dynexport
