// The manifest of a bundle (docs/bundle.md), with the fields that a runtime needs.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace dynexport {

enum class Type { kFloat, kFloat16, kBfloat16, kInt8, kInt32, kInt64, kBool };
enum class Phase { kPrompt, kDecode };

// Bytes of an element.
std::size_t size_of(Type type);

// Returns the name of an element type in the manifest, such as "float16".
std::string_view name_of(Type type);

std::string_view name_of(Phase phase);

// A dimension: a number, or a symbol such as B.
struct Dimension {
  std::int64_t size = 0;  // used if symbol is empty
  std::string symbol;
};

struct TensorSpec {
  std::string name;
  Type type = Type::kFloat;
  std::vector<Dimension> shape;
};

struct Range {
  std::int64_t least = 0, best = 0, most = 0;
};

// An optimization profile of a TensorRT engine; name is "prefill" or "decode".
struct Profile {
  std::string name;
  std::map<std::string, Range> ranges;
};

struct Graph {
  std::string name, file;
  std::vector<std::int64_t> layers;
  // For a file that several graphs share, the value of its input ``part``; none for a file of its own.
  std::optional<std::int64_t> part;
  std::optional<std::vector<std::int64_t>> places;
  bool share_memory = true;
  std::vector<Profile> profiles;
  std::vector<TensorSpec> inputs, outputs;

  bool takes(std::string_view input) const;
  bool returns(std::string_view output) const;
  // The greatest size of a dimension over all profiles; none if any size is accepted.
  std::optional<std::int64_t> limit(std::string_view symbol) const;
};

// Prefixes of the names of inputs and outputs that hold a cache.
constexpr std::string_view kPast = "past_key_values.", kPresent = "present.";
// The input of a file that several graphs share: the number of the part to run.
constexpr std::string_view kPart = "part";

struct GraphSet {
  std::string embedding, attention, head;
  std::vector<std::string> routers, before_attention, after_attention;
  std::vector<std::string> layers;  // of whole layers, for one token of each row; may be empty

  std::vector<std::string> names() const;
};

struct Program {
  Phase phase = Phase::kPrompt;
  std::optional<std::string> depth;
  std::optional<std::string> graph;
  std::optional<GraphSet> set;
};

struct CachePart {
  std::string input, output;
  Type type = Type::kFloat;
  std::vector<Dimension> shape;
  std::optional<std::string> scale;
};

struct Cache {
  std::int64_t place = 0;
  std::map<std::string, CachePart> parts;
  std::optional<std::int64_t> most;
  std::int64_t per_token = 1, slack = 0;
};

enum class Together { kAlways, kEmpty, kNever };

struct Limits {
  std::optional<std::int64_t> rows, prompt, filled, tokens, logits;
  Together together = Together::kEmpty;
  bool whole_prompts = false, compete = false;
};

// A table that says which token is likeliest to follow some tokens.
struct Ngrams {
  std::string file;
  std::int64_t entries = 0, tokens = 0;
  double acceptance = 0;
};

// How tokens are drafted where a user does not say.
struct Drafting {
  std::int64_t most = 0;
  std::optional<std::vector<std::int64_t>> keep;  // layers that draft; none: what followed before is looked up
  std::optional<double> gain;                     // none before it was measured
  std::optional<Ngrams> ngrams;
};
constexpr std::int64_t kMostDrafts = 64, kMostNgrams = 1 << 18;

// What a token that skips a layer leaves in its cache: no entry, one without running it, or one that is computed.
enum class SkippedKv { kNone, kKept, kComputed };

struct LayerRouting {
  std::vector<std::int64_t> layers;
  std::vector<std::string> parts{"layer"};  // what the decisions about each layer are about
  std::int64_t span = 1;                    // layers that each decision is about
  SkippedKv skipped_kv = SkippedKv::kNone;
  bool overflow_is_error = false;

  // The number of decisions about a token.
  std::int64_t decisions() const { return static_cast<std::int64_t>(layers.size() * parts.size()); }
  // The layer, or the first layer of the run, that a decision is about.
  std::int64_t layer_of(std::int64_t decision) const {
    return layers.at(static_cast<std::size_t>(decision) / parts.size());
  }
  // A name for each decision: its layer, and its part where a layer has two.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const std::int64_t layer : layers)
      for (const std::string& part : parts)
        found.push_back(std::to_string(layer) + (parts.size() == 1 ? "" : "." + part));
    return found;
  }
};

struct PathRouting {
  std::int64_t hops = 0, min_hops = 0;
  bool exit = false, reuse = false, places_are_layers = false;
  double layer_capacity = 1.0;
};

using Routing = std::variant<std::monostate, LayerRouting, PathRouting>;

struct Model {
  std::string family;
  std::int64_t layers = 0, hidden_size = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab_size = 0, max_length = 0,
               parameters = 0;
  // Of each layer, 0 without attention, where layers differ; empty if all have ``heads`` and ``kv_heads``.
  std::vector<std::int64_t> heads_of_layers, kv_heads_of_layers;
  // The number of key and value heads in a place, 0 where there is no attention.
  std::int64_t kv_heads_in(std::int64_t place) const {
    return kv_heads_of_layers.empty() ? kv_heads : kv_heads_of_layers.at(static_cast<std::size_t>(place));
  }
};

struct Depth {
  std::string name;
  std::optional<double> ratio;
  std::vector<std::int64_t> keep, prompt;
  bool trained = false;
};

struct Tokens {
  std::optional<std::int64_t> bos, pad;
  std::vector<std::int64_t> eos, turn_end;
};

struct File {
  std::string sha256;
  std::uint64_t bytes = 0;
};

struct Manifest {
  bool trained = false;
  std::string target, precision;
  Model model;
  std::vector<Depth> depths;
  std::vector<Program> programs;
  std::vector<Graph> graphs;
  std::vector<Cache> caches;  // in the order of places, from 0
  Routing routing;
  std::optional<Drafting> drafting;
  Limits limits;
  std::vector<std::string>
      operators;  // names of dynexport's custom operators in the graphs; each has a body there, too
  Tokens tokens;
  std::map<std::string, File> files;

  // Full depth: every token runs in every layer, except where routers decide.
  Depth full() const;
  // Throws Error if there is no graph of this name.
  const Graph& graph(std::string_view name) const;
  // The program for a phase and depth: one for that depth, else one for every depth. Throws Error if there is none.
  const Program& program(Phase phase, const Depth& depth) const;
};

// Reads and checks a manifest's JSON text: the same checks, with the same words, as Python's
// (runtime/bundle/manifest.py). ``where`` is named in errors.
Manifest parse_manifest(std::string_view text, const std::string& where);

}  // namespace dynexport
