// Checks the fields of Mixture-of-Depths in the contract, in the order and words of Python's
// runtime/bundle/mod_fields.py.
#include "bundle/mod_contract.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <optional>
#include <set>

#include "bundle/text.hpp"

namespace dynexport {
namespace {

using Layers = std::vector<std::int64_t>;

// Returns the index of the rule.
std::size_t check_decision(const Value& value) {
  Fields fields(value);
  const std::size_t rule = fields.optional(
      "rule",
      [](const Value& rule) {
        return choice(rule, {"router", "predictor", "always"});
      },
      0);
  fields.optional("threshold", number, 0.5);
  fields.optional(
      "comparison",
      [](const Value& sign) {
        return choice(sign, {">", ">="});
      },
      0);
  fields.done();
  return rule;
}

// Returns the capacity.
double check_cache(const Value& value) {
  Fields fields(value);
  const double capacity = fields.optional("capacity", share, 1.0);
  fields.optional(
      "overflow",
      [](const Value& rule) {
        return choice(rule, {"residual", "error"});
      },
      0);
  fields.done();
  return capacity;
}

Layers routed_layers(const Value& value) {
  Layers found = list(value, any_whole, 1);
  const std::set<std::int64_t> different(found.begin(), found.end());
  if (different.size() < found.size() || *different.begin() < 0) {
    value.refuse_as("expected different layers from 0, found " + std::string(cut(quoted_value(value.json()), 80)));
  }
  return found;
}

// The layers that have a threshold of their own.
std::set<std::int64_t> thresholds(const Value& value) {
  std::set<std::int64_t> result;
  for (const auto& [name, item] : object(value).items()) {
    const Value threshold(item, value, name);
    std::int64_t layer = 0;
    const char* end = name.data() + name.size();
    const auto read = std::from_chars(name.data(), end, layer);
    if (read.ec != std::errc() || read.ptr != end) {
      Value(item, threshold, "[key]")
          .refuse_as("Input should be a valid integer, unable to parse string as an integer, found " +
                     std::string(cut(in_quotes(name), 80)));
    }
    number(threshold);
    result.insert(layer);
  }
  return result;
}

// The values of the fields that exclude others.
struct Mod {
  std::size_t version = 1, gate = 0, combine = 0, rule = 0, prefill = 0, positions = 0;
  double capacity = 1.0;
  std::size_t target = 0, skipped_kv = 0, kind = 0, activation = 0, skip_branch = 0, level = 0, boundary = 0;
  std::optional<Json> epsilon, affine;
  bool router_is_default = true;
  std::int64_t keep_first = 0;
};

constexpr const char* kGates[] = {"raw", "sigmoid", "none", "split", "affine"};
constexpr const char* kTargets[] = {"block", "attention", "mlp", "attention+mlp"};
constexpr const char* kKinds[] = {"linear", "bottleneck", "mlp", "pair"};
enum : std::size_t { kBlock, kAttention, kMlp, kBoth };
enum : std::size_t { kRaw, kSigmoid, kUngated, kSplit, kAffine };

std::size_t version(const Value& value) {
  const Json& json = value.json();
  if (json.is_number_integer() && (json == 1 || json == 2)) return json.get<std::size_t>() - 1;
  value.refuse("1 or 2");
}

double above_0_below_1(const Value& value) {
  const double found = number(value);
  if (!(found > 0)) value.refuse("greater than 0");
  if (!(found < 1)) value.refuse("less than 1");
  return found;
}

bool check_form_of_router(const Value& value, Mod& mod) {
  Fields fields(value);
  mod.kind = fields.optional(
      "kind",
      [](const Value& kind) {
        return choice(kind, {"linear", "bottleneck", "mlp", "pair"});
      },
      0);
  mod.activation = fields.optional(
      "activation",
      [](const Value& activation) {
        return choice(activation, {"silu", "relu"});
      },
      0);
  const auto epsilon = fields.optional("epsilon", nullable(above_0_below_1), std::nullopt);
  if (epsilon) mod.epsilon = Json(*epsilon);
  fields.done();
  mod.router_is_default = mod.kind == 0 && mod.activation == 0 && !epsilon;
  return true;
}

bool check_two_numbers(const Value& value, Mod& mod) {
  if (value.json().is_null()) return true;
  const std::vector<double> found = list(value, number);
  if (found.size() > 2) {
    value.refuse_as("Tuple should have at most 2 items after validation, not " + std::to_string(found.size()));
  }
  if (found.size() < 2) Value(value.json(), value, found.size()).refuse_as("Field required");
  mod.affine = Json(found);
  return true;
}

// The first of the fields of version 2 that has another value than version 1 means; empty for none.
std::string new_field(const Mod& mod) {
  if (mod.target != kBlock) return "target";
  if (mod.skipped_kv != 0) return "skipped_kv";
  if (!mod.router_is_default) return "router";
  if (mod.skip_branch != 0) return "skip_branch";
  if (mod.keep_first != 0) return "keep_first";
  if (mod.level != 0) return "level";
  return mod.boundary != 0 ? "boundary" : "";
}

std::string short_number(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

void check_caches_of(const Value& value, const Mod& mod) {
  const bool everybody = mod.target == kMlp || mod.skipped_kv == 1;
  if (mod.target == kMlp && mod.skipped_kv == 1)
    value.refuse_as("skipped_kv: expected none with target mlp, as no token skips attention, found own");
  if (everybody && mod.positions == 1)
    value.refuse_as("positions: expected original where every token has an entry in the layer's cache, found compact");
  if (everybody && mod.capacity != 1)
    value.refuse_as("cache.capacity: expected 1 where every token has an entry in the layer's cache, found " +
                    short_number(mod.capacity));
  if (mod.level == 0) return;
  if (mod.target > kAttention || mod.skipped_kv != 0 || mod.keep_first > 0)
    value.refuse_as(
        "level: expected token with target mlp or attention+mlp, skipped_kv own or keep_first, as the decision about a "
        "sequence is whether its tokens have entries, found sequence");
  if (mod.gate != kUngated)
    value.refuse_as(std::string("gate: expected none with level sequence, found ") + kGates[mod.gate]);
  if (mod.capacity != 1)
    value.refuse_as("cache.capacity: expected 1 with level sequence, found " + short_number(mod.capacity));
}

void check_branches_of(const Value& value, const Mod& mod) {
  const bool of_mlp = mod.gate == kSplit || mod.gate == kAffine;
  const std::string gate = kGates[mod.gate];
  if (of_mlp && mod.target == kAttention)
    value.refuse_as("gate: expected raw, sigmoid or none with target attention, found " + gate +
                    ", which is the MLP's");
  if (mod.combine == 1 && (mod.target != kBlock || of_mlp))
    value.refuse_as(std::string("combine: expected delta with target ") + kTargets[mod.target] + " and gate " + gate +
                    ", found replace");
  if (mod.affine.has_value() != (mod.gate == kAffine))
    value.refuse_as("affine: expected two numbers with gate affine and only there, found " +
                    (mod.affine ? quoted_value(*mod.affine) : std::string("none")));
  if (mod.skip_branch == 1 && mod.target == kAttention)
    value.refuse_as("skip_branch: expected none with target attention, found adapter, which is in the MLP's place");
  if (mod.skip_branch == 1 && mod.gate != kUngated && mod.gate != kSplit)
    value.refuse_as("gate: expected none or split with skip_branch adapter, found " + gate);
}

void check_prompts_of(const Value& value, const Mod& mod) {
  const std::string start = "prefill: expected causal with ";
  if (mod.prefill == 1) {
    if (mod.target != kBlock) value.refuse_as(start + "target " + kTargets[mod.target] + ", found topk");
    if (mod.skipped_kv != 0) value.refuse_as(start + "skipped_kv own, found topk");
    if (mod.keep_first != 0) value.refuse_as(start + "keep_first " + std::to_string(mod.keep_first) + ", found topk");
    if (mod.level != 0) value.refuse_as(start + "level sequence, found topk");
  } else if (mod.boundary == 1) {
    value.refuse_as("boundary: expected k where prompts are routed causally, found k-1; it is about prefill topk");
  }
}

void check_together(const Value& value, const Mod& mod) {
  if (mod.version == 0) {
    const std::string field = new_field(mod);
    if (!field.empty()) value.refuse_as("version: expected 2, which has the field " + field + ", found 1");
    if (mod.gate == kSplit || mod.gate == kAffine)
      value.refuse_as(std::string("version: expected 2, which has the gate ") + kGates[mod.gate] + ", found 1");
  }
  check_caches_of(value, mod);
  check_branches_of(value, mod);
  check_prompts_of(value, mod);
  if (mod.rule == 1 && (mod.kind != 0 || mod.level != 0 || mod.target == kBoth))
    value.refuse_as(
        "decision.rule: expected router or always with router.kind other than linear, level sequence or target "
        "attention+mlp, found predictor");
  if (mod.activation != 0 && mod.kind != 2)
    value.refuse_as("router.activation: expected silu where router.kind is not mlp, found relu");
  if (mod.epsilon && mod.kind != 1 && mod.kind != 2)
    value.refuse_as(std::string("router.epsilon: expected none where router.kind is ") + kKinds[mod.kind] + ", found " +
                    quoted_value(*mod.epsilon));
}

// Reads the fields that version 2 adds.
void read_new_fields(Fields& fields, Mod& mod) {
  mod.target = fields.optional(
      "target",
      [](const Value& target) {
        return choice(target, {"block", "attention", "mlp", "attention+mlp"});
      },
      0);
  mod.skipped_kv = fields.optional(
      "skipped_kv",
      [](const Value& rule) {
        return choice(rule, {"none", "own"});
      },
      0);
  fields.optional(
      "router", [&mod](const Value& router) { return check_form_of_router(router, mod); }, true);
  mod.skip_branch = fields.optional(
      "skip_branch",
      [](const Value& branch) {
        return choice(branch, {"none", "adapter"});
      },
      0);
  fields.optional(
      "affine", [&mod](const Value& affine) { return check_two_numbers(affine, mod); }, true);
  mod.keep_first = fields.optional("keep_first", from_0, 0);
  mod.level = fields.optional(
      "level",
      [](const Value& level) {
        return choice(level, {"token", "sequence"});
      },
      0);
  mod.boundary = fields.optional(
      "boundary",
      [](const Value& boundary) {
        return choice(boundary, {"k", "k-1"});
      },
      0);
}

}  // namespace

void check_mod(const Value& value) {
  Fields fields(value);
  Mod mod;
  mod.version = fields.optional("version", version, 1);
  const Layers routed = fields.required("routed_layers", routed_layers);
  fields.optional("capacity", share, 0.125);
  fields.optional(
      "rounding",
      [](const Value& rule) {
        return choice(rule, {"floor", "ceil"});
      },
      0);
  fields.optional(
      "router_input",
      [](const Value& input) {
        return choice(input, {"hidden", "normed"});
      },
      0);
  mod.gate = fields.optional(
      "gate",
      [](const Value& gate) {
        return choice(gate, {"raw", "sigmoid", "none", "split", "affine"});
      },
      0);
  mod.combine = fields.optional(
      "combine",
      [](const Value& rule) {
        return choice(rule, {"delta", "replace"});
      },
      0);
  mod.rule = fields.optional("decision", check_decision, 0);
  mod.prefill = fields.optional(
      "prefill",
      [](const Value& rule) {
        return choice(rule, {"causal", "topk"});
      },
      0);
  mod.positions = fields.optional(
      "positions",
      [](const Value& rule) {
        return choice(rule, {"original", "compact"});
      },
      0);
  mod.capacity = fields.optional("cache", check_cache, 1.0);
  const auto single = fields.optional("thresholds", thresholds, std::set<std::int64_t>());
  read_new_fields(fields, mod);
  fields.required("strategy", text);
  fields.done();
  for (const std::int64_t layer : single) {
    if (std::find(routed.begin(), routed.end(), layer) == routed.end()) {
      value.refuse_as("thresholds: expected routed layers, found " + std::to_string(layer));
    }
  }
  check_together(value, mod);
}

}  // namespace dynexport
