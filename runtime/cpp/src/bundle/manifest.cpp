// The manifest of a bundle: its parsing, and look-ups in it.
#include "dynexport/manifest.hpp"

#include <algorithm>
#include <numeric>

#include "bundle/agreement.hpp"
#include "bundle/contract.hpp"
#include "bundle/sections.hpp"
#include "bundle/text.hpp"
#include "dynexport/error.hpp"

namespace dynexport {
namespace {

constexpr std::int64_t kSchemaVersion = 2;
constexpr const char* kFull = "full";

bool has(const std::vector<TensorSpec>& specs, std::string_view name) {
  return std::any_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) { return spec.name == name; });
}

void check_version(const Json& fields, const std::string& where) {
  Json found;
  if (fields.is_object()) found = fields.value("schema_version", Json());
  if (found.is_number_integer() && found == kSchemaVersion) return;
  const bool newer = found.is_number_integer() && found > kSchemaVersion;
  throw Error(where + ": schema_version: expected 2, found " + std::string(cut(quoted_value(found), 40)) + "; " +
              (newer ? "it was made by a newer dynexport, update this one" : "convert the model again"));
}

std::string one_of(const Value& value, std::initializer_list<std::string_view> choices) {
  return std::string(choices.begin()[choice(value, choices)]);
}

}  // namespace

std::size_t size_of(Type type) {
  switch (type) {
    case Type::kFloat:
    case Type::kInt32:
      return 4;
    case Type::kFloat16:
    case Type::kBfloat16:
      return 2;
    case Type::kInt64:
      return 8;
    case Type::kInt8:
    case Type::kBool:
      break;
  }
  return 1;
}

std::string_view name_of(Type type) {
  switch (type) {
    case Type::kFloat:
      return "float";
    case Type::kFloat16:
      return "float16";
    case Type::kBfloat16:
      return "bfloat16";
    case Type::kInt8:
      return "int8";
    case Type::kInt32:
      return "int32";
    case Type::kInt64:
      return "int64";
    case Type::kBool:
      break;
  }
  return "bool";
}

std::string_view name_of(Phase phase) { return phase == Phase::kPrompt ? "prompt" : "decode"; }

bool Graph::takes(std::string_view input) const { return has(inputs, input); }

bool Graph::returns(std::string_view output) const { return has(outputs, output); }

std::optional<std::int64_t> Graph::limit(std::string_view symbol) const {
  std::optional<std::int64_t> result;
  for (const Profile& profile : profiles) {
    const auto found = profile.ranges.find(std::string(symbol));
    if (found != profile.ranges.end()) result = std::max(result.value_or(0), found->second.most);
  }
  return result;
}

std::vector<std::string> GraphSet::names() const {
  std::vector<std::string> result = {embedding, attention, head};
  for (const auto* part : {&routers, &before_attention, &after_attention, &layers}) {
    result.insert(result.end(), part->begin(), part->end());
  }
  return result;
}

Depth Manifest::full() const {
  Depth result;
  result.name = kFull;
  result.ratio = 1.0;
  result.keep.resize(static_cast<std::size_t>(model.layers));
  std::iota(result.keep.begin(), result.keep.end(), 0);
  result.prompt = result.keep;
  result.trained = true;
  return result;
}

const Graph& Manifest::graph(std::string_view name) const {
  for (const Graph& graph : graphs) {
    if (graph.name == name) return graph;
  }
  throw Error("graphs: expected one of the name " + std::string(cut(name, 80)) + ", found none; convert again");
}

const Program& Manifest::program(Phase phase, const Depth& depth) const {
  const Program* for_every_depth = nullptr;
  for (const Program& program : programs) {
    if (program.phase != phase) continue;
    if (program.depth == depth.name) return program;
    if (!program.depth && for_every_depth == nullptr) for_every_depth = &program;
  }
  if (for_every_depth != nullptr) return *for_every_depth;
  throw Error("no graph for the phase " + std::string(name_of(phase)) + " at the depth " +
              std::string(cut(depth.name, 80)) + "; convert again with it");
}

Manifest parse_manifest(std::string_view json, const std::string& where) {
  const Json content = parse_json(json, where);
  check_version(content, where);
  const Value value(content, where);
  Fields fields(value);
  Manifest result;
  fields.required("schema_version", any_whole);
  fields.required("contract", check_contract);
  result.trained = fields.required("trained", boolean);
  result.target = fields.optional(
      "target",
      [](const Value& target) {
        return one_of(target, {"onnxruntime", "tensorrt"});
      },
      "onnxruntime");
  result.precision = fields.required("precision", [](const Value& precision) {
    return one_of(precision, {"fp32", "fp16", "bf16", "int8", "int4", "gguf"});
  });
  result.model = fields.required("model", read_model);
  result.depths = fields.required("depths", [](const Value& depths) { return list(depths, read_depth); });
  result.programs = fields.required("programs", [](const Value& programs) { return list(programs, read_program, 1); });
  result.graphs = fields.required("graphs", [](const Value& graphs) { return list(graphs, read_graph, 1); });
  result.caches = fields.required("caches", [](const Value& caches) { return list(caches, read_cache, 1); });
  fields.optional("cache_text", check_cache_text, false);
  result.routing = fields.optional("routing", read_routing, std::monostate());
  result.drafting = fields.optional("drafting", read_drafting, std::nullopt);
  result.limits = fields.required("limits", read_limits);
  const CostSizes cost = fields.required("cost", read_cost_sizes);
  result.operators = fields.optional(
      "operators", [](const Value& operators) { return list(operators, text); }, std::vector<std::string>());
  result.tokens = fields.required("tokens", read_tokens);
  fields.required("source", check_source);
  fields.required("tools", [](const Value& tools) { return by_name(tools, text).size(); });
  result.files = fields.required("files", [](const Value& files) { return by_name(files, read_file); });
  fields.done();
  check_agreement(result, cost, where);
  std::sort(result.caches.begin(), result.caches.end(),
            [](const Cache& one, const Cache& other) { return one.place < other.place; });
  return result;
}

}  // namespace dynexport
