// A program whose graphs are loaded.
#pragma once

#include "execution/calls.hpp"

namespace dynexport {

class Running {
 public:
  virtual ~Running() = default;
  // The graph whose sizes limit a call.
  virtual const Graph& graph() const = 0;
  // Runs one call on its rows' caches; the caller commits the entries that it wrote. Throws Error when the engine
  // fails, RouteError for a route that the contract defines as an error.
  virtual CallResult run(KvCache::State& cache, const Call& call) = 0;
};

}  // namespace dynexport
