#include "engines/tensorrt/record.hpp"

#include <nlohmann/json.hpp>
#include <set>

#include "bundle/fields.hpp"
#include "bundle/sections.hpp"
#include "bundle/sha256.hpp"
#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

// Engines do not depend on these files.
const std::set<std::string>& text_files() {
  static const std::set<std::string> names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                              "golden.safetensors"};
  return names;
}

// As Python's json.dumps with sorted keys writes it, without spaces.
std::string digest(const nlohmann::json& fields) { return sha256_of(fields.dump(-1, ' ', true)); }

nlohmann::json tensors(const std::vector<TensorSpec>& specs) {
  nlohmann::json result = nlohmann::json::array();
  for (const TensorSpec& spec : specs) {
    nlohmann::json shape = nlohmann::json::array();
    for (const Dimension& dimension : spec.shape) {
      shape.push_back(dimension.symbol.empty() ? nlohmann::json(dimension.size) : nlohmann::json(dimension.symbol));
    }
    result.push_back({{"name", spec.name}, {"dtype", name_of(spec.type)}, {"shape", shape}});
  }
  return result;
}

// A graph's entry in the manifest, with every field.
nlohmann::json entry(const Graph& graph) {
  nlohmann::json profiles = nlohmann::json::array();
  for (const Profile& profile : graph.profiles) {
    nlohmann::json ranges = nlohmann::json::object();
    for (const auto& [symbol, range] : profile.ranges) ranges[symbol] = {range.least, range.best, range.most};
    profiles.push_back({{"name", profile.name}, {"ranges", ranges}});
  }
  return {{"name", graph.name},
          {"file", graph.file},
          {"layers", graph.layers},
          {"part", graph.part ? nlohmann::json(*graph.part) : nlohmann::json()},
          {"places", graph.places ? nlohmann::json(*graph.places) : nlohmann::json()},
          {"share_memory", graph.share_memory},
          {"profiles", profiles},
          {"inputs", tensors(graph.inputs)},
          {"outputs", tensors(graph.outputs)}};
}

std::size_t version_1(const Value& value) { return static_cast<std::size_t>(whole(value, 1)); }

std::string backend(const Value& value) {
  constexpr std::string_view kNames[] = {"tensorrt", "tensorrt-rtx"};
  return std::string(kNames[choice(value, {kNames[0], kNames[1]})]);
}

// Digits, a dot, and a digit.
std::string capability(const Value& value) {
  std::string found = text(value);
  const std::size_t dot = found.find('.');
  const bool good = (dot == 1 || dot == 2) && found.size() == dot + 2 &&
                    found.find_first_not_of("0123456789.") == std::string::npos &&
                    found.find('.', dot + 1) == std::string::npos;
  if (!good) value.refuse("a compute capability");
  return found;
}

GraphHashes graph_hashes(const Value& value) {
  Fields fields(value);
  GraphHashes result;
  result.name = fields.required("name", text);
  result.graph = fields.required("graph_sha256", sha256);
  result.weights = fields.required("weights_sha256", sha256);
  result.interface = fields.required("interface_sha256", sha256);
  fields.done();
  return result;
}

void read_recipe(const Value& value, EngineRecord& record) {
  Fields fields(value);
  if (fields.optional("record_version", version_1, 1U) != 1) value.refuse("record_version 1");
  record.graph = fields.required("graph", graph_hashes);
  record.backend = fields.required("backend", backend);
  record.backend_version = fields.required("backend_version", text);
  record.compute_capabilities =
      fields.required("compute_capabilities", [](const Value& names) { return list(names, capability); });
  record.gpu = fields.optional("gpu", nullable(text), std::nullopt);
  record.plugins_sha256 = fields.optional("plugins_sha256", nullable(sha256), std::nullopt);
  record.stripped = fields.optional("stripped", boolean, false);
  fields.done();
}

bool any_value(const Value&) { return true; }

}  // namespace

GraphHashes GraphHashes::of(const Manifest& manifest, const Graph& graph) {
  std::set<std::string> others = text_files();
  for (const Graph& other : manifest.graphs) others.insert(other.file);
  nlohmann::json weights = nlohmann::json::object();
  for (const auto& [name, file] : manifest.files) {
    if (others.count(name) == 0) weights[name] = file.sha256;
  }
  const auto file = manifest.files.find(graph.file);
  if (file == manifest.files.end()) throw Error("files: expected " + graph.file + ", found none; convert again");
  return {graph.name, file->second.sha256, digest(weights), digest(entry(graph))};
}

EngineRecord parse_record(const std::string& text, const std::string& where) {
  const Json json = parse_json_object(text, where);
  const Value value(json, where);
  Fields fields(value);
  EngineRecord record;
  fields.required("recipe", [&](const Value& recipe) {
    read_recipe(recipe, record);
    return true;
  });
  record.engine = fields.required("engine", read_file);
  for (const char* unused : {"profiles", "cuda", "build_seconds", "peak_bytes"}) fields.required(unused, any_value);
  fields.done();
  return record;
}

std::string sha256_of(const std::string& content) {
  Sha256 sha256;
  sha256.add(content.data(), content.size());
  return sha256.hex();
}

}  // namespace dynexport::tensorrt
