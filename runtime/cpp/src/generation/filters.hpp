// The draw of a token from a row of logits: the filtered distribution, and fast ways to draw from it.
#pragma once

#include <cstdint>
#include <vector>

#include "dynexport/sampler.hpp"
#include "generation/row_math.hpp"

namespace dynexport {

using Ids = std::vector<std::uint32_t>;

// Draws a token from the distribution that temperature, top_k, top_p, min_p and typical_p leave, as Python's
// runtime/generation/filters.py: in float64 for short rows and top_k, else with softmax in float32.
//
// ``largest`` is the row's largest logit, finite; ``uniform`` in [0, 1) selects the token.
std::int64_t draw(Row row, float largest, const Sampling& sampling, double uniform);

// Returns the ids of the ``count`` largest logits, largest first; among equal logits, the lowest id first.
Ids largest_ids(Row row, std::size_t count);

}  // namespace dynexport
