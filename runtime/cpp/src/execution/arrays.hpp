// Arrays on the host, as inputs and results of engines.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "dynexport/engine.hpp"
#include "execution/bindings.hpp"

namespace dynexport {

// An array that owns its elements, row-major.
struct Array {
  Type type = Type::kFloat;
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> bytes;

  template <typename T>
  static Array of(Type type, std::vector<std::int64_t> shape, const std::vector<T>& values) {
    Array made{type, std::move(shape), std::vector<std::uint8_t>(values.size() * sizeof(T))};
    if (!values.empty()) std::memcpy(made.bytes.data(), values.data(), made.bytes.size());
    return made;
  }
  static Array of_longs(std::vector<std::int64_t> shape, const std::vector<std::int64_t>& values) {
    return of(Type::kInt64, std::move(shape), values);
  }
  static Array of_bools(std::vector<std::int64_t> shape, const std::vector<std::uint8_t>& values) {
    return of(Type::kBool, std::move(shape), values);
  }
};

using Arrays = std::map<std::string, Array>;

// Binds those of the inputs that a graph has, writes them, and runs it. Throws Error when an input is missing or of
// another type, or the engine fails.
Binding& run_engine(Bindings& bindings, const std::shared_ptr<Engine>& engine, const Arrays& inputs,
                    const Caches& caches);

// The shapes of those of the inputs that a graph has. Throws Error for one that is missing.
Shapes shapes_of(const Graph& graph, const Arrays& inputs);
// Writes inputs into bound memory. Throws Error for one of another type or size.
void write_inputs(const Graph& graph, Binding& binding, const Arrays& inputs);

// A result of an engine. Throws Error unless it has this type and shape; -1 stands for any size.
Tensor result_of(Binding& binding, const Graph& graph, const std::string& name, Type type,
                 const std::vector<std::int64_t>& shape);

}  // namespace dynexport
