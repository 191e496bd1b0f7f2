// Checks the routing contract in a manifest, in the order and words of Python's.
#include "bundle/contract.hpp"

#include <set>

#include "bundle/mod_contract.hpp"
#include "bundle/text.hpp"

namespace dynexport {
namespace {

constexpr std::int64_t kMostSteps = 4096;
constexpr std::int64_t kMostLoops = 64;
constexpr std::size_t kMostItems = 64;

using Layers = std::vector<std::int64_t>;

Layers layers(const Value& value) { return list(value, any_whole); }
Layers some_layers(const Value& value) { return list(value, any_whole, 1); }

void check_most(const Value& value, std::size_t most) {
  if (array(value).size() > most) {
    value.refuse_as("Tuple should have at most " + std::to_string(most) + " items after validation, not " +
                    std::to_string(value.json().size()));
  }
}

std::string listed(const Value& value) { return std::string(cut(quoted_value(value.json()), 80)); }

Layers layers_once(const Value& value) {
  Layers found = layers(value);
  if (std::set<std::int64_t>(found.begin(), found.end()).size() < found.size()) {
    value.refuse_as("expected every layer once, found " + listed(value));
  }
  return found;
}

bool check_speedups(const Value& value) {
  check_most(value, kMostItems);
  for (const double ratio : list(value, number)) {
    if (ratio < 1) value.refuse_as("expected finite ratios >= 1, found " + quoted_value(Json(ratio)));
  }
  return !value.json().empty();
}

void check_unified_skip(const Value& value) {
  Fields fields(value);
  fields.required("strategy", text);
  const bool some = fields.optional("speedups", check_speedups, true);
  fields.optional(
      "rule",
      [](const Value& rule) {
        return choice(rule, {"official", "balanced", "modulo"});
      },
      0);
  fields.optional("order", nullable(layers_once), std::nullopt);
  const auto keep = fields.optional("keep", nullable(layers), std::nullopt);
  fields.done();
  if (!keep && !some) value.refuse_as("speedups: expected at least one ratio, or keep, found neither");
  if (keep && keep->empty()) value.refuse_as("keep: expected at least one layer, found none");
}

bool check_router(const Value& value) {
  Fields fields(value);
  fields.optional("hidden", size, 64);
  fields.optional("shared", boolean, true);
  fields.done();
  return true;
}

std::int64_t steps(const Value& value) { return at_most(value, kMostSteps); }
std::int64_t loops(const Value& value) { return at_most(value, kMostLoops); }

void check_radial(const Value& value) {
  Fields fields(value);
  fields.required("strategy", text);
  const std::int64_t most = fields.optional("max_steps", steps, 12);
  const std::int64_t least = fields.optional("min_steps", at_least_0, 0);
  fields.optional("exit", boolean, true);
  fields.optional("allow_reuse", boolean, true);
  fields.optional("router", check_router, true);
  fields.optional(
      "gate",
      [](const Value& gate) {
        return choice(gate, {"none", "probability"});
      },
      0);
  fields.optional(
      "cache_policy",
      [](const Value& policy) {
        return choice(policy, {"step", "layer"});
      },
      0);
  fields.done();
  if (least > most) {
    value.refuse_as("min_steps: expected at most max_steps = " + std::to_string(most) + ", found " +
                    std::to_string(least));
  }
}

bool exits(const Value& value) {
  check_most(value, kMostItems);
  std::int64_t last = 0;
  for (const std::int64_t exit : some_layers(value)) {
    if (exit <= last) value.refuse_as("expected ascending numbers of layers from 1, found " + listed(value));
    last = exit;
  }
  return true;
}

void check_early_exit(const Value& value) {
  Fields fields(value);
  fields.required("strategy", text);
  fields.required("exits", exits);
  fields.optional(
      "prompt",
      [](const Value& rule) {
        return choice(rule, {"full", "exit"});
      },
      0);
  fields.done();
}

Layers body(const Value& value) {
  check_most(value, 2);
  Layers found = layers(value);
  if (found.size() < 2) {
    Value(value.json(), value, found.size()).refuse_as("Field required");
  }
  return found;
}

double below_one(const Value& value) {
  if (!(number(value) < 1)) value.refuse("less than 1");
  return above_0(value);
}

bool check_loop_exit(const Value& value) {
  Fields fields(value);
  fields.optional(
      "rule",
      [](const Value& rule) {
        return choice(rule, {"none", "hazard", "change"});
      },
      0);
  fields.optional("threshold", below_one, 0.5);
  fields.done();
  return true;
}

void check_loop(const Value& value) {
  Fields fields(value);
  fields.required("strategy", text);
  fields.required("loops", loops);
  const auto repeated = fields.optional("body", nullable(body), std::nullopt);
  fields.optional("norm_between", boolean, true);
  fields.optional("norm_after", boolean, false);
  fields.optional(
      "inject",
      [](const Value& rule) {
        return choice(rule, {"none", "adapter"});
      },
      0);
  fields.optional("state_seed", nullable(from_0), std::nullopt);
  fields.optional("exit", check_loop_exit, true);
  fields.optional(
      "exited_kv",
      [](const Value& rule) {
        return choice(rule, {"compute", "last", "absent"});
      },
      0);
  fields.done();
  if (repeated && !(0 <= repeated->front() && repeated->front() <= repeated->back())) {
    value.refuse_as("body: expected first and last layer, from 0, found [" + std::to_string(repeated->front()) + ", " +
                    std::to_string(repeated->back()) + "]");
  }
}

void check_dense(const Value& value) {
  Fields fields(value);
  fields.required("strategy", text);
  fields.done();
}

struct Strategy {
  std::string_view name;
  void (*check)(const Value& value);
};

constexpr Strategy kStrategies[] = {
    {"dense", check_dense},   {"unified-skip", check_unified_skip}, {"mod", check_mod},
    {"radial", check_radial}, {"early-exit", check_early_exit},     {"loop", check_loop}};

}  // namespace

bool check_contract(const Value& value) {
  const std::string name = tag(value, "strategy", {"dense", "unified-skip", "mod", "radial", "early-exit", "loop"});
  for (const Strategy& strategy : kStrategies) {
    if (strategy.name == name) strategy.check(Value(value.json(), value, strategy.name));
  }
  return true;
}

}  // namespace dynexport
