// Checks that the sections of a manifest agree with each other, in the order and words of Python's.
#include "bundle/agreement.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include "bundle/text.hpp"
#include "dynexport/error.hpp"

namespace dynexport {
namespace {

// A cache's head size is the model's, rounded up to a multiple of this if the engine requires it.
constexpr std::int64_t kHeadDimMultiple = 8;

std::string short_name(std::string_view name) { return std::string(cut(name, 80)); }
std::string short_quoted(std::string_view name) { return std::string(cut(in_quotes(name), 80)); }

// A shape as Python writes a list.
std::string short_shape(const std::vector<Dimension>& shape) {
  std::string text = "[";
  for (const Dimension& dimension : shape) {
    if (text.size() > 1) text += ", ";
    text += dimension.symbol.empty() ? std::to_string(dimension.size) : in_quotes(dimension.symbol);
    if (text.size() > 400) break;  // more is not shown
  }
  return std::string(cut(text + "]", 80));
}

bool equal(const Dimension& one, const Dimension& other) {
  return one.size == other.size && one.symbol == other.symbol;
}

class Agreement {
 public:
  Agreement(const Manifest& manifest, const std::string& where) : manifest_(manifest), where_(where) {}

  void check(const CostSizes& cost) const {
    check_layers(cost);
    check_names();
    check_programs();
    check_caches();
    check_ngrams();
  }

 private:
  [[noreturn]] void refuse(const std::string& message) const { throw Error(where_ + ": " + without_breaks(message)); }

  // Checks a list that has an entry for each layer; one that may be absent says that layers differ.
  void check_list(const char* name, std::size_t found, bool may_be_absent) const {
    if (found == 0 && may_be_absent) return;
    if (found != static_cast<std::size_t>(manifest_.model.layers)) {
      refuse(std::string(name) + ": expected " + std::to_string(manifest_.model.layers) +
             " as in model.layers, found " + std::to_string(found));
    }
    if (may_be_absent && std::holds_alternative<PathRouting>(manifest_.routing))
      refuse(std::string(name) + ": expected layers of one size where routing has paths, found others");
  }

  void check_parts(std::size_t found) const {
    const auto* layers = std::get_if<LayerRouting>(&manifest_.routing);
    const std::size_t decided = layers == nullptr ? 0 : static_cast<std::size_t>(layers->decisions());
    if (found != 0 && found != decided) {
      refuse("cost.parts: expected one for each of " + std::to_string(decided) + " decisions, found " +
             std::to_string(found));
    }
  }

  void check_layers(const CostSizes& cost) const {
    check_list("cost.layers", cost.layers, false);
    check_list("model.heads_of_layers", manifest_.model.heads_of_layers.size(), true);
    check_list("model.kv_heads_of_layers", manifest_.model.kv_heads_of_layers.size(), true);
    check_list("cost.kv_of_layers", cost.kv_of_layers, true);
    check_list("cost.flops_of_layers", cost.flops_of_layers, true);
    check_parts(cost.parts);
    if (const auto* routing = std::get_if<LayerRouting>(&manifest_.routing)) {
      const auto decisions = static_cast<std::int64_t>(routing->layers.size());
      if (decisions * routing->span > manifest_.model.layers) {
        refuse("routing.span: expected " + std::to_string(manifest_.model.layers) + " layers in all, found " +
               std::to_string(decisions) + " times " + std::to_string(routing->span));
      }
      std::vector<std::int64_t> covered;
      for (const std::int64_t layer : routing->layers) {
        for (std::int64_t more = 0; more < routing->span; ++more) {
          covered.push_back(layer < 0 || layer >= manifest_.model.layers ? manifest_.model.layers : layer + more);
        }
      }
      check_ascending("routing.layers", covered);
    }
    if (manifest_.drafting && manifest_.drafting->keep) check_ascending("keep of drafting", *manifest_.drafting->keep);
    for (const Graph& graph : manifest_.graphs)
      check_ascending("layers of graph " + short_name(graph.name), graph.layers);
    for (const Depth& depth : manifest_.depths) check_ascending("keep of depth " + short_name(depth.name), depth.keep);
    for (const Depth& depth : manifest_.depths) {
      check_ascending("prompt of depth " + short_name(depth.name), depth.prompt);
    }
  }

  void check_ascending(const std::string& name, const std::vector<std::int64_t>& layers) const {
    std::int64_t least = 0;
    for (const std::int64_t layer : layers) {
      if (layer < least || layer >= manifest_.model.layers) {
        refuse(name + ": expected ascending layers 0.." + std::to_string(manifest_.model.layers - 1) +
               ", found others");
      }
      least = layer + 1;
    }
  }

  void check_names() const {
    std::unordered_set<std::string_view> depths, graphs;
    for (const Depth& depth : manifest_.depths) {
      if (!depths.insert(depth.name).second) refuse("depths: expected a name for each, found one twice");
    }
    for (const Graph& graph : manifest_.graphs) {
      if (!graphs.insert(graph.name).second) refuse("graphs: expected a name for each, found one twice");
    }
    if (depths.count("full") != 0) refuse("depths: expected other names than full, which every bundle has, found it");
    check_parts();
  }

  void check_parts() const {
    std::map<std::string_view, std::set<std::optional<std::int64_t>>> parts;
    for (const Graph& graph : manifest_.graphs) {
      auto& others = parts[graph.file];
      if (others.count(std::nullopt) != 0 || (!graph.part && !others.empty()) || !others.insert(graph.part).second) {
        refuse("graphs: " + short_name(graph.name) + ": expected a part of its own in a shared file, found none");
      }
    }
  }

  void check_programs() const {
    std::unordered_set<std::string_view> depths = {"full"}, graphs;
    for (const Depth& depth : manifest_.depths) depths.insert(depth.name);
    for (const Graph& graph : manifest_.graphs) graphs.insert(graph.name);
    for (const Program& program : manifest_.programs) {
      if (program.graph.has_value() == program.set.has_value()) {
        refuse("programs: expected either a graph or a set in each, found both or none");
      }
      if (program.depth && depths.count(*program.depth) == 0) {
        refuse("programs: expected a depth of the manifest, found " + short_quoted(*program.depth));
      }
      check_graphs(program, graphs);
      if (program.set) check_set(*program.set);
    }
    check_every_depth(Phase::kPrompt);
    check_every_depth(Phase::kDecode);
  }

  void check_graphs(const Program& program, const std::unordered_set<std::string_view>& graphs) const {
    std::set<std::string> unknown;
    for (const std::string& name : program.set ? program.set->names() : std::vector<std::string>{*program.graph}) {
      if (graphs.count(name) == 0) unknown.insert(name);
    }
    if (!unknown.empty()) {
      refuse("programs: expected a graph of the manifest, found " + short_quoted(*unknown.begin()));
    }
  }

  void check_set(const GraphSet& set) const {
    const auto* routing = std::get_if<PathRouting>(&manifest_.routing);
    if (routing == nullptr) refuse("programs: expected a set where routing has paths, found one without");
    check_count("routers", set.routers.size(), routing->hops);
    check_count("before_attention", set.before_attention.size(), manifest_.model.layers);
    check_count("after_attention", set.after_attention.size(), manifest_.model.layers);
    if (!set.layers.empty()) check_count("layers", set.layers.size(), manifest_.model.layers);
  }

  void check_count(const std::string& name, std::size_t found, std::int64_t expected) const {
    if (found != static_cast<std::size_t>(expected)) {
      refuse("programs: set: " + name + ": expected " + std::to_string(expected) + " names, found " +
             std::to_string(found));
    }
  }

  void check_every_depth(Phase phase) const {
    std::unordered_set<std::string_view> depths;
    for (const Program& program : manifest_.programs) {
      if (program.phase != phase) continue;
      if (!program.depth) return;
      depths.insert(*program.depth);
    }
    if (depths.count("full") == 0) refuse_program(phase, "full");
    for (const Depth& depth : manifest_.depths) {
      if (depths.count(depth.name) == 0) refuse_program(phase, depth.name);
    }
  }

  [[noreturn]] void refuse_program(Phase phase, std::string_view depth) const {
    refuse("programs: no graph for the phase " + std::string(name_of(phase)) + " at the depth " + short_name(depth) +
           "; convert again with it");
  }

  void check_ngrams() const {
    if (!manifest_.drafting || !manifest_.drafting->ngrams) return;
    const std::string& file = manifest_.drafting->ngrams->file;
    if (manifest_.files.count(file) == 0)
      refuse("drafting.ngrams: expected its file " + short_name(file) + " among files, found none");
  }

  void check_caches() const {
    check_places();
    for (const Cache& cache : manifest_.caches) check_cache(cache);
    const auto count = static_cast<std::int64_t>(manifest_.caches.size());
    std::unordered_map<std::string, const Cache*> by_place;
    for (const Cache& cache : manifest_.caches) by_place.emplace(std::to_string(cache.place), &cache);
    for (const Graph& graph : manifest_.graphs) {
      for (const std::int64_t place : graph.places.value_or(std::vector<std::int64_t>())) {
        if (place < 0 || place >= count) {
          refuse("places of graph " + short_name(graph.name) + ": expected places of caches, found others");
        }
      }
      check_inputs(graph, by_place);
    }
  }

  void check_places() const {
    const std::size_t found = manifest_.caches.size();
    std::vector<bool> seen(found);
    for (const Cache& cache : manifest_.caches) {
      const auto place = static_cast<std::size_t>(cache.place);
      if (place >= found || seen[place]) {
        refuse("caches: expected the places 0.." + std::to_string(found - 1) + ", found others");
      }
      seen[place] = true;
    }
    const auto* paths = std::get_if<PathRouting>(&manifest_.routing);
    const bool by_hop = paths != nullptr && !paths->places_are_layers;
    const std::int64_t expected = by_hop ? paths->hops : manifest_.model.layers;
    if (static_cast<std::int64_t>(found) != expected) {
      refuse("caches: expected one for each of " + std::to_string(expected) + (by_hop ? " hops" : " layers") +
             ", found " + std::to_string(found));
    }
  }

  void check_cache(const Cache& cache) const {
    const std::int64_t heads = manifest_.model.kv_heads_in(cache.place), size = manifest_.model.head_dim;
    if (heads == 0) {
      if (cache.parts.empty()) return;
      refuse("cache " + std::to_string(cache.place) + ": expected no parts in a layer without attention, found some");
    }
    const std::int64_t padded = (size + kHeadDimMultiple - 1) / kHeadDimMultiple * kHeadDimMultiple;
    for (const char* name : {"key", "value"}) {
      const std::string place = "cache " + std::to_string(cache.place) + ": " + name + ": ";
      const auto part = cache.parts.find(name);
      const std::vector<Dimension> shape = part == cache.parts.end() ? std::vector<Dimension>() : part->second.shape;
      if (shape.size() != 4 || shape[1].size != heads || (shape[3].size != size && shape[3].size != padded)) {
        refuse(place + "expected " + std::to_string(heads) + " heads of " + std::to_string(size) +
               " as in model, found " + short_shape(shape));
      }
      if ((part->second.type == Type::kInt8) != part->second.scale.has_value()) {
        refuse(place + "expected a scale for int8 and only there");
      }
    }
    check_slots(cache);
  }

  // Checks that all parts of a cache have the same rows and slots.
  void check_slots(const Cache& cache) const {
    const Dimension& slots = cache.parts.at("key").shape[2];
    for (const auto& [name, part] : cache.parts) {
      const bool has_heads = part.shape.size() == 4;
      if (slots.symbol == "B" || !(has_heads || part.shape.size() == 2) || part.shape[0].symbol != "B" ||
          !equal(part.shape[has_heads ? 2 : 1], slots)) {
        refuse("cache " + std::to_string(cache.place) + ": " + name +
               ": expected rows B and the slots of its keys, found " + short_shape(part.shape));
      }
    }
  }

  // Checks that a graph's inputs that hold caches are as ``caches`` has them.
  void check_inputs(const Graph& graph, const std::unordered_map<std::string, const Cache*>& by_place) const {
    for (const TensorSpec& spec : graph.inputs) {
      if (std::string_view(spec.name).substr(0, kPast.size()) != kPast) continue;
      const std::string name = spec.name.substr(kPast.size());
      const std::size_t dot = name.rfind('.');
      const bool of_one = dot != std::string::npos && dot > 0;
      const std::string part = dot == std::string::npos ? name : name.substr(dot + 1);
      if (of_one) {
        const auto found = by_place.find(name.substr(0, dot));
        check_input(graph, spec, part, found == by_place.end() ? nullptr : found->second);
      } else {
        for (const Cache& cache : manifest_.caches) check_input(graph, spec, part, &cache);
      }
    }
  }

  void check_input(const Graph& graph, const TensorSpec& spec, const std::string& name, const Cache* cache) const {
    const std::string place = "graph " + short_name(graph.name) + ": " + short_name(spec.name) + ": ";
    if (cache == nullptr || cache->parts.count(name) == 0)
      refuse(place + "expected a cache's part, found no such cache");
    const CachePart& part = cache->parts.at(name);
    std::vector<Dimension> shape = spec.shape;
    for (Dimension& dimension : shape) {
      if (dimension.symbol == "M_routed") dimension.symbol = "M";
    }
    if (part.type != spec.type ||
        !std::equal(shape.begin(), shape.end(), part.shape.begin(), part.shape.end(), equal)) {
      refuse(place + "expected " + std::string(name_of(part.type)) + " " + short_shape(part.shape) +
             " as in caches, found " + std::string(name_of(spec.type)) + " " + short_shape(spec.shape));
    }
  }

  const Manifest& manifest_;
  const std::string& where_;
};

}  // namespace

void check_agreement(const Manifest& manifest, const CostSizes& cost, const std::string& where) {
  Agreement(manifest, where).check(cost);
}

}  // namespace dynexport
