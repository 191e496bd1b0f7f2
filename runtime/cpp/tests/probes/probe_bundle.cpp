// Opens a bundle, and prints what it read as JSON; with "check" before it, checks it again after a line on standard
// input; or parses manifests (without arguments) or ONNX files ("graphs") from standard input.
//
// Each is preceded by a line with its number of bytes. A line is printed for each: what was found, or the error.
#include <iostream>
#include <nlohmann/json.hpp>

#include "bundle/onnx_file.hpp"
#include "dynexport/bundle.hpp"
#include "dynexport/error.hpp"

namespace {

using Json = nlohmann::json;

template <typename Item, typename Convert>
Json list(const std::vector<Item>& items, Convert convert) {
  Json result = Json::array();
  for (const Item& item : items) result.push_back(convert(item));
  return result;
}

template <typename Item>
Json maybe(const std::optional<Item>& value) {
  return value ? Json(*value) : Json();
}

Json of(const dynexport::Dimension& dimension) {
  return dimension.symbol.empty() ? Json(dimension.size) : Json(dimension.symbol);
}

Json of(const std::vector<dynexport::Dimension>& shape) {
  return list(shape, [](const auto& dimension) { return of(dimension); });
}

Json of(const dynexport::TensorSpec& spec) {
  return {{"name", spec.name}, {"dtype", name_of(spec.type)}, {"shape", of(spec.shape)}};
}

Json of(const dynexport::Profile& profile) {
  Json ranges = Json::object();
  for (const auto& [symbol, range] : profile.ranges) ranges[symbol] = {range.least, range.best, range.most};
  return {{"name", profile.name}, {"ranges", ranges}};
}

Json of(const dynexport::Graph& graph) {
  const auto specs = [](const auto& spec) { return of(spec); };
  return {{"name", graph.name},
          {"file", graph.file},
          {"layers", graph.layers},
          {"part", maybe(graph.part)},
          {"places", maybe(graph.places)},
          {"share_memory", graph.share_memory},
          {"profiles", list(graph.profiles, specs)},
          {"inputs", list(graph.inputs, specs)},
          {"outputs", list(graph.outputs, specs)}};
}

Json of(const dynexport::GraphSet& set) {
  return {{"embedding", set.embedding},
          {"routers", set.routers},
          {"before_attention", set.before_attention},
          {"attention", set.attention},
          {"after_attention", set.after_attention},
          {"layers", set.layers},
          {"head", set.head}};
}

Json of(const dynexport::Program& program) {
  return {{"phase", name_of(program.phase)},
          {"depth", maybe(program.depth)},
          {"graph", maybe(program.graph)},
          {"set", program.set ? of(*program.set) : Json()}};
}

Json of(const dynexport::Cache& cache) {
  Json parts = Json::object();
  for (const auto& [name, part] : cache.parts) {
    parts[name] = {{"input", part.input},
                   {"output", part.output},
                   {"dtype", name_of(part.type)},
                   {"shape", of(part.shape)},
                   {"scale", maybe(part.scale)}};
  }
  return {{"place", cache.place},
          {"parts", parts},
          {"most", maybe(cache.most)},
          {"per_token", cache.per_token},
          {"slack", cache.slack}};
}

Json of(const dynexport::Routing& routing) {
  if (const auto* layers = std::get_if<dynexport::LayerRouting>(&routing)) {
    constexpr const char* kSkipped[] = {"none", "kept", "computed"};
    return {{"kind", "layers"},
            {"layers", layers->layers},
            {"parts", layers->parts},
            {"span", layers->span},
            {"skipped_kv", kSkipped[static_cast<std::size_t>(layers->skipped_kv)]},
            {"overflow", layers->overflow_is_error ? "error" : "residual"}};
  }
  const auto* paths = std::get_if<dynexport::PathRouting>(&routing);
  if (paths == nullptr) return nullptr;
  return {{"kind", "paths"},
          {"hops", paths->hops},
          {"min_hops", paths->min_hops},
          {"exit", paths->exit},
          {"reuse", paths->reuse},
          {"places", paths->places_are_layers ? "layers" : "hops"},
          {"layer_capacity", paths->layer_capacity}};
}

Json of(const dynexport::Depth& depth) {
  return {{"name", depth.name},
          {"ratio", maybe(depth.ratio)},
          {"keep", depth.keep},
          {"prompt", depth.prompt},
          {"trained", depth.trained}};
}

Json of(const dynexport::Model& model) {
  return {{"family", model.family},
          {"layers", model.layers},
          {"hidden_size", model.hidden_size},
          {"heads", model.heads},
          {"kv_heads", model.kv_heads},
          {"head_dim", model.head_dim},
          {"vocab_size", model.vocab_size},
          {"max_length", model.max_length},
          {"parameters", model.parameters},
          {"heads_of_layers", model.heads_of_layers},
          {"kv_heads_of_layers", model.kv_heads_of_layers}};
}

Json of(const dynexport::Limits& limits) {
  constexpr const char* kTogether[] = {"always", "empty", "never"};
  return {{"rows", maybe(limits.rows)},
          {"prompt", maybe(limits.prompt)},
          {"filled", maybe(limits.filled)},
          {"tokens", maybe(limits.tokens)},
          {"logits", maybe(limits.logits)},
          {"together", kTogether[static_cast<int>(limits.together)]},
          {"whole_prompts", limits.whole_prompts},
          {"compete", limits.compete}};
}

Json of(const std::optional<dynexport::Drafting>& drafting) {
  if (!drafting) return nullptr;
  Json ngrams;
  if (const auto& found = drafting->ngrams)
    ngrams = {{"file", found->file},
              {"entries", found->entries},
              {"tokens", found->tokens},
              {"acceptance", found->acceptance}};
  return {{"most", drafting->most},
          {"keep", maybe(drafting->keep)},
          {"gain", maybe(drafting->gain)},
          {"ngrams", std::move(ngrams)}};
}

Json of(const dynexport::Manifest& manifest) {
  const auto each = [](const auto& item) { return of(item); };
  Json files = Json::object();
  for (const auto& [name, file] : manifest.files) files[name] = {{"sha256", file.sha256}, {"bytes", file.bytes}};
  return {{"trained", manifest.trained},
          {"target", manifest.target},
          {"precision", manifest.precision},
          {"operators", manifest.operators},
          {"model", of(manifest.model)},
          {"depths", list(manifest.depths, each)},
          {"programs", list(manifest.programs, each)},
          {"graphs", list(manifest.graphs, each)},
          {"caches", list(manifest.caches, each)},
          {"routing", of(manifest.routing)},
          {"drafting", of(manifest.drafting)},
          {"limits", of(manifest.limits)},
          {"tokens",
           {{"bos", maybe(manifest.tokens.bos)},
            {"eos", manifest.tokens.eos},
            {"turn_end", manifest.tokens.turn_end},
            {"pad", maybe(manifest.tokens.pad)}}},
          {"files", files}};
}

std::string parsed_manifest(const std::string& text) {
  dynexport::parse_manifest(text, "manifest.json");
  return "ok";
}

std::string parsed_graph(const std::string& content) {
  Json locations = Json::array();
  for (const auto& data : dynexport::external_data(content, "model.onnx")) locations.push_back(data.location);
  return locations.dump(-1, ' ', true, Json::error_handler_t::replace);
}

template <typename Parse>
void parse_many(Parse parse) {
  std::string size;
  while (std::getline(std::cin, size)) {
    std::string text(std::stoul(size), '\0');
    std::cin.read(text.data(), static_cast<std::streamsize>(text.size()));
    try {
      std::cout << parse(text) << "\n";
    } catch (const dynexport::Error& error) {
      std::cout << error.what() << "\n";
    }
  }
}

// Prints the manifest, and the depth of each further argument ("-" for none).
void open_one(int count, char** arguments) {
  const auto bundle = dynexport::Bundle::open(arguments[1]);
  Json result = of(bundle->manifest());
  result["found"] = Json::array();
  for (int i = 2; i < count; ++i) {
    const std::string wanted = arguments[i];
    result["found"].push_back(of(bundle->depth(wanted == "-" ? std::optional<std::string>() : wanted)));
  }
  std::cout << result << "\n";
}

void check_later(const char* directory) {
  const auto bundle = dynexport::Bundle::open(directory);
  std::cout << "opened" << std::endl;
  std::string line;
  std::getline(std::cin, line);
  bundle->check();
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count == 1) {
      parse_many(parsed_manifest);
    } else if (arguments[1] == std::string("graphs")) {
      parse_many(parsed_graph);
    } else if (count == 3 && arguments[1] == std::string("check")) {
      check_later(arguments[2]);
    } else {
      open_one(count, arguments);
    }
    return dynexport::kExitGood;
  } catch (const dynexport::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return dynexport::kExitBadInput;
  }
}
