// The bound calls of one cache: engines bind memory once for the same rows and sizes.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <utility>

#include "dynexport/engine.hpp"

namespace dynexport {

// The latest bindings of every engine and place.
class Bindings {
 public:
  // Returns a binding of an engine to some rows of the caches; a later call may destroy it.
  Binding& get(const std::shared_ptr<Engine>& engine, const Shapes& shapes, const Caches& caches);
  void clear() { known_.clear(); }

 private:
  // A server alternates between decode steps for a few row ranges and prompts.
  static constexpr std::size_t kMost = 8;

  struct Bound {
    std::shared_ptr<Engine> engine;  // outlives the binding
    Shapes shapes;
    std::int64_t first, rows;
    std::uint64_t version;
    std::unique_ptr<Binding> binding;
  };

  std::map<std::pair<const Engine*, std::int64_t>, std::list<Bound>> known_;  // the latest used last
};

}  // namespace dynexport
