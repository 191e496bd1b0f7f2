// Arrays on the host, as inputs and results of engines.
#include "execution/arrays.hpp"

#include "dynexport/error.hpp"
#include "engines/sizes.hpp"
#include "execution/checks.hpp"

namespace dynexport {
namespace {

bool fits(const std::vector<std::int64_t>& found, const std::vector<std::int64_t>& expected) {
  if (found.size() != expected.size()) return false;
  for (std::size_t i = 0; i < found.size(); ++i)
    if (expected[i] >= 0 && expected[i] != found[i]) return false;
  return true;
}

}  // namespace

Shapes shapes_of(const Graph& graph, const Arrays& inputs) {
  Shapes shapes;
  for (const TensorSpec& spec : graph.inputs) {
    if (is_cache_input(spec)) continue;
    const auto found = inputs.find(spec.name);
    if (found == inputs.end())
      throw Error(graph.file + ": expected an input that a step has, found " + shown(spec.name) + "; convert again");
    shapes[spec.name] = found->second.shape;
  }
  return shapes;
}

void write_inputs(const Graph& graph, Binding& binding, const Arrays& inputs) {
  for (const auto& [name, values] : inputs) {
    if (!graph.takes(name)) continue;
    const Tensor memory = binding.input(name);
    if (memory.type != values.type || memory.bytes() != values.bytes.size())
      throw Error(graph.file + ": " + name + ": expected " + std::string(name_of(values.type)) + " " +
                  listed(values.shape) + ", found " + std::string(name_of(memory.type)) + " " + listed(memory.shape));
    if (!values.bytes.empty()) std::memcpy(memory.data, values.bytes.data(), values.bytes.size());
  }
}

Binding& run_engine(Bindings& bindings, const std::shared_ptr<Engine>& engine, const Arrays& inputs,
                    const Caches& caches) {
  Binding& binding = bindings.get(engine, shapes_of(engine->graph(), inputs), caches);
  write_inputs(engine->graph(), binding, inputs);
  binding.run();
  return binding;
}

Tensor result_of(Binding& binding, const Graph& graph, const std::string& name, Type type,
                 const std::vector<std::int64_t>& shape) {
  Tensor found = binding.result(name);
  if (found.type != type || !fits(found.shape, shape))
    throw Error(graph.file + ": " + name + ": expected " + std::string(name_of(type)) + " " + listed(shape) +
                ", found " + std::string(name_of(found.type)) + " " + listed(found.shape));
  return found;
}

}  // namespace dynexport
