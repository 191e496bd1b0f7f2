// The state of one call of a graph set.
#pragma once

#include <cstdint>
#include <vector>

#include "execution/arrays.hpp"
#include "execution/lines.hpp"

namespace dynexport {

// The N tokens of a call, concatenated row by row in the order of their positions.
struct Walk {
  std::int64_t first = 0, rows_of_call = 0, tokens = 0;
  Indices rows, positions;     // [N], each token's row in the cache and position
  Array hidden_states;         // [N, hidden]
  Arrays angles;               // with rotary positions "cos" and "sin" [N, ..]
  Indices forced;              // [hops, N], -1 where the router decides
  Indices before, lengths;     // [places, B], entries before the call and now
  bool one_each = true;        // whether every row of the call has exactly one token
  std::vector<bool> alive;     // [N], until the token exits
  std::vector<bool> visited;   // [N, layers], layers that the token ran
  Indices path;                // [hops, N], the layer; the number of layers for an exit, -1 after it
  std::vector<float> scores;   // [hops, N], of each choice; 0 after the exit
  std::vector<float> margins;  // [hops, N], the distance to the next best choice; infinity after the exit
};

// The tokens that run a layer in a hop, their layers and their gates.
struct Chosen {
  Indices tokens, layers;
  Array gates;  // [n, 1]; no elements if the router has none
};

}  // namespace dynexport
