// Runs the router of a hop: each token's next layer, or its exit.
#pragma once

#include <cstdint>
#include <memory>

#include "execution/bindings.hpp"
#include "execution/walk.hpp"

namespace dynexport {

// Chooses the layers of a hop's tokens and notes them in the walk. Throws Error for scores that are NaN or infinite,
// and for choices that there are not.
Chosen choose(Bindings& bindings, const std::shared_ptr<Engine>& router, const PathRouting& routing,
              std::int64_t layers, std::int64_t hop, Walk& walk);

}  // namespace dynexport
