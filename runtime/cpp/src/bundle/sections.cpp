// Reads the sections of a manifest, in the order of fields that Python reads them in.
#include "bundle/sections.hpp"

namespace dynexport {
namespace {

constexpr std::string_view kTypes[] = {"float", "float16", "bfloat16", "int8", "int32", "int64", "bool"};

std::vector<std::int64_t> layers(const Value& value) { return list(value, any_whole, 1); }
std::vector<std::int64_t> indices(const Value& value) { return list(value, any_whole); }
std::vector<std::string> names(const Value& value) { return list(value, text); }

Type type(const Value& value) {
  const std::string found = text(value);
  std::size_t index = 0;
  for (const std::string_view name : kTypes) {
    if (found == name) return static_cast<Type>(index);
    ++index;
  }
  value.refuse_pattern("^(float|float16|bfloat16|int8|int32|int64|bool)$");
}

// A number, or one of the symbols that ``is_symbol`` accepts.
template <typename IsSymbol>
Dimension dimension(const Value& value, IsSymbol is_symbol) {
  Dimension result;
  if (value.json().is_string() && is_symbol(value.json().get_ref<const std::string&>())) {
    result.symbol = text(value);
  } else {
    result.size = size(Value(value.json(), value, "constrained-int"));
  }
  return result;
}

Dimension any_dimension(const Value& value) {
  return dimension(value, [](const std::string&) { return true; });
}

Dimension cache_dimension(const Value& value) {
  return dimension(value, [](const std::string& symbol) { return symbol == "B" || symbol == "M"; });
}

TensorSpec tensor(const Value& value) {
  Fields fields(value);
  TensorSpec result;
  result.name = fields.required("name", text);
  result.type = fields.required("dtype", type);
  result.shape = fields.required("shape", [](const Value& shape) { return list(shape, any_dimension); });
  fields.done();
  return result;
}

Range range(const Value& value) {
  const Json& items = array(value);
  constexpr std::size_t kSizes = 3;
  if (items.size() > kSizes) {
    value.refuse_as("Tuple should have at most 3 items after validation, not " + std::to_string(items.size()));
  }
  std::int64_t sizes[kSizes] = {};
  for (std::size_t i = 0; i < kSizes; ++i) {
    if (i == items.size()) Value(items, value, i).refuse_as("Field required");
    sizes[i] = size(Value(items[i], value, i));
  }
  return {sizes[0], sizes[1], sizes[2]};
}

Profile profile(const Value& value) {
  Fields fields(value);
  Profile result;
  constexpr std::string_view kNames[] = {"prefill", "decode"};
  result.name = fields.required("name", [&](const Value& name) { return kNames[choice(name, {"prefill", "decode"})]; });
  result.ranges = fields.required("ranges", [](const Value& ranges) { return by_name(ranges, range); });
  fields.done();
  return result;
}

GraphSet graph_set(const Value& value) {
  Fields fields(value);
  GraphSet result;
  result.embedding = fields.required("embedding", text);
  result.routers = fields.required("routers", names);
  result.before_attention = fields.required("before_attention", names);
  result.attention = fields.required("attention", text);
  result.after_attention = fields.required("after_attention", names);
  result.layers = fields.optional("layers", names, std::vector<std::string>());
  result.head = fields.required("head", text);
  fields.done();
  return result;
}

CachePart cache_part(const Value& value) {
  Fields fields(value);
  CachePart result;
  result.input = fields.required("input", text);
  result.output = fields.required("output", text);
  result.type = fields.required("dtype", type);
  result.shape = fields.required("shape", [](const Value& shape) { return list(shape, cache_dimension); });
  result.scale = fields.optional("scale", nullable(text), std::nullopt);
  fields.done();
  return result;
}

std::vector<std::string> parts_of_layers(const Value& value) {
  static const std::vector<std::string> known{"layer", "attention", "mlp"};
  const std::vector<std::string> found = list(
      value,
      [](const Value& part) {
        return known[static_cast<std::size_t>(choice(part, {"layer", "attention", "mlp"}))];
      },
      1);
  if (found.size() > 2) {
    value.refuse_as("Tuple should have at most 2 items after validation, not " + std::to_string(found.size()));
  }
  return found;
}

LayerRouting layer_routing(const Value& value) {
  Fields fields(value);
  LayerRouting result;
  fields.required("kind", text);
  result.layers = fields.required("layers", layers);
  result.parts = fields.optional("parts", parts_of_layers, std::vector<std::string>{"layer"});
  result.span = fields.optional("span", size, 1);
  result.skipped_kv = fields.optional(
      "skipped_kv",
      [](const Value& rule) {
        return static_cast<SkippedKv>(choice(rule, {"none", "kept", "computed"}));
      },
      SkippedKv::kNone);
  result.overflow_is_error = fields.required("overflow", [](const Value& rule) {
    return choice(rule, {"residual", "error"}) == 1;
  });
  fields.done();
  return result;
}

PathRouting path_routing(const Value& value) {
  Fields fields(value);
  PathRouting result;
  fields.required("kind", text);
  result.hops = fields.required("hops", size);
  result.min_hops = fields.required("min_hops", from_0);
  result.exit = fields.required("exit", boolean);
  result.reuse = fields.required("reuse", boolean);
  result.places_are_layers = fields.required("places", [](const Value& places) {
    return choice(places, {"hops", "layers"}) == 1;
  });
  result.layer_capacity = fields.optional("layer_capacity", share, 1.0);
  fields.done();
  return result;
}

bool any_object(const Value& value) { return object(value).is_object(); }

}  // namespace

Model read_model(const Value& value) {
  Fields fields(value);
  Model result;
  result.family = fields.required("family", text);
  result.layers = fields.required("layers", size);
  result.hidden_size = fields.required("hidden_size", size);
  result.heads = fields.required("heads", size);
  result.kv_heads = fields.required("kv_heads", size);
  result.head_dim = fields.required("head_dim", size);
  result.vocab_size = fields.required("vocab_size", size);
  result.max_length = fields.required("max_length", size);
  result.parameters = fields.required("parameters", at_least_1);
  const auto heads = [](const Value& counts) { return list(counts, from_0); };
  result.heads_of_layers = fields.optional("heads_of_layers", heads, std::vector<std::int64_t>());
  result.kv_heads_of_layers = fields.optional("kv_heads_of_layers", heads, std::vector<std::int64_t>());
  fields.done();
  return result;
}

Depth read_depth(const Value& value) {
  Fields fields(value);
  Depth result;
  result.name = fields.required("name", text);
  result.ratio = fields.required("ratio", nullable(number));
  result.keep = fields.required("keep", layers);
  result.prompt = fields.required("prompt", layers);
  result.trained = fields.optional("trained", boolean, false);
  fields.done();
  return result;
}

Program read_program(const Value& value) {
  Fields fields(value);
  Program result;
  result.phase = fields.required("phase", [](const Value& phase) {
    return static_cast<Phase>(choice(phase, {"prompt", "decode"}));
  });
  result.depth = fields.optional("depth", nullable(text), std::nullopt);
  result.graph = fields.optional("graph", nullable(text), std::nullopt);
  result.set = fields.optional("set", nullable(graph_set), std::nullopt);
  fields.done();
  return result;
}

Graph read_graph(const Value& value) {
  Fields fields(value);
  Graph result;
  result.name = fields.required("name", text);
  result.file = fields.required("file", text);
  result.layers = fields.required("layers", indices);
  result.part = fields.optional("part", nullable(any_whole), std::nullopt);
  result.places = fields.required("places", nullable(indices));
  result.share_memory = fields.optional("share_memory", boolean, true);
  result.profiles = fields.optional(
      "profiles", [](const Value& profiles) { return list(profiles, profile); }, std::vector<Profile>());
  result.inputs = fields.required("inputs", [](const Value& inputs) { return list(inputs, tensor); });
  result.outputs = fields.required("outputs", [](const Value& outputs) { return list(outputs, tensor); });
  fields.done();
  return result;
}

Cache read_cache(const Value& value) {
  Fields fields(value);
  Cache result;
  result.place = fields.required("place", from_0);
  result.parts = fields.required("parts", [](const Value& parts) { return by_name(parts, cache_part); });
  result.most = fields.optional("most", nullable(size), std::nullopt);
  result.per_token = fields.optional("per_token", size, 1);
  result.slack = fields.optional("slack", from_0, 0);
  fields.done();
  return result;
}

Routing read_routing(const Value& value) {
  if (value.json().is_null()) return std::monostate();
  if (tag(value, "kind", {"layers", "paths"}) == "layers") return layer_routing(Value(value.json(), value, "layers"));
  return path_routing(Value(value.json(), value, "paths"));
}

Ngrams read_ngrams(const Value& value) {
  Fields fields(value);
  Ngrams result;
  result.file = fields.required("file", text);
  result.entries = fields.required("entries", [](const Value& entries) { return at_most(entries, kMostNgrams); });
  result.tokens = fields.required("tokens", size);
  result.acceptance = fields.required("acceptance", from_0_to_1);
  fields.done();
  return result;
}

std::optional<Drafting> read_drafting(const Value& value) {
  if (value.json().is_null()) return std::nullopt;
  Fields fields(value);
  Drafting result;
  result.most = fields.required("most", [](const Value& most) { return at_most(most, kMostDrafts); });
  result.keep = fields.optional("keep", nullable(layers), std::nullopt);
  result.gain = fields.optional("gain", nullable(above_0), std::nullopt);
  result.ngrams = fields.optional("ngrams", nullable(read_ngrams), std::nullopt);
  fields.done();
  return result;
}

Limits read_limits(const Value& value) {
  Fields fields(value);
  Limits result;
  result.rows = fields.optional("rows", nullable(size), std::nullopt);
  result.prompt = fields.optional("prompt", nullable(size), std::nullopt);
  result.filled = fields.optional("filled", nullable(size), std::nullopt);
  result.tokens = fields.optional("tokens", nullable(size), std::nullopt);
  result.logits = fields.optional("logits", nullable(size), std::nullopt);
  result.together = fields.optional(
      "together",
      [](const Value& rule) {
        return static_cast<Together>(choice(rule, {"always", "empty", "never"}));
      },
      Together::kEmpty);
  result.whole_prompts = fields.optional("whole_prompts", boolean, false);
  result.compete = fields.optional("compete", boolean, false);
  fields.done();
  return result;
}

Tokens read_tokens(const Value& value) {
  Fields fields(value);
  Tokens result;
  result.bos = fields.optional("bos", nullable(any_whole), std::nullopt);
  result.eos = fields.optional("eos", indices, std::vector<std::int64_t>());
  result.turn_end = fields.optional("turn_end", indices, std::vector<std::int64_t>());
  result.pad = fields.optional("pad", nullable(any_whole), std::nullopt);
  fields.done();
  return result;
}

File read_file(const Value& value) {
  Fields fields(value);
  File result;
  result.sha256 = fields.required("sha256", sha256);
  result.bytes = static_cast<std::uint64_t>(fields.required("bytes", at_least_0));
  fields.done();
  return result;
}

std::size_t check_part_costs(const Value& value) {
  return list(value,
              [](const Value& part) {
                Fields fields(part);
                fields.required("run", at_least_0);
                return fields.optional("skip", at_least_0, 0);
              })
      .size();
}

CostSizes read_cost_sizes(const Value& value) {
  Fields fields(value);
  CostSizes result;
  const auto count = [](const Value& costs) { return list(costs, at_least_0).size(); };
  fields.required("shared", at_least_1);
  result.layers = fields.required("layers", count);
  fields.required("kv_per_token", at_least_0);
  fields.required("layer_flops", at_least_1);
  fields.optional("router", at_least_0, 0);
  fields.optional("router_flops", at_least_0, 0);
  result.parts = fields.optional("parts", check_part_costs, 0);
  fields.optional("experts", at_least_0, 0);
  fields.optional("experts_per_token", at_least_0, 0);
  fields.optional(
      "expert", [](const Value& costs) { return list(costs, at_least_0); }, std::vector<std::int64_t>{});
  result.kv_of_layers = fields.optional("kv_of_layers", count, std::size_t{0});
  result.flops_of_layers = fields.optional("flops_of_layers", count, std::size_t{0});
  fields.done();
  return result;
}

bool check_cache_text(const Value& value) {
  if (value.json().is_null()) return false;
  Fields fields(value);
  fields.required("source", [](const Value& source) { return choice(source, {"built-in", "given"}); });
  fields.required("tokens", size);
  fields.required("sha256", sha256);
  fields.done();
  return true;
}

bool check_source(const Value& value) {
  Fields fields(value);
  fields.required("model", text);
  fields.required("config_sha256", text);
  fields.required("config", any_object);
  fields.optional("importer", nullable(text), std::nullopt);
  fields.optional("adapter", nullable(text), std::nullopt);
  fields.done();
  return true;
}

}  // namespace dynexport
