// The routers' decisions for tokens: reads and checks them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/kv_cache.hpp"

namespace dynexport {

// Throws an Error for a router score of a hop that is NaN or infinite.
[[noreturn]] void refuse_nan_in_hop(std::int64_t hop, std::int64_t row, std::int64_t position);

// New entries of every cache and the decisions of every row.
struct Read {
  std::vector<std::int64_t> entries;  // [places, B]
  std::vector<Decisions> decisions;   // one per row
};

// The rows of a call, for reading its decisions.
struct ReadFor {
  const std::vector<std::int64_t>& counts;     // [B], tokens of each row
  const std::vector<std::int64_t>& positions;  // [B], of each row's first token
  const std::vector<std::uint8_t>& active;     // [layers]
  std::int64_t first = 0;                      // the first row in the cache
  std::int64_t tokens = 0;                     // S
};

// Reads and checks the decisions among a graph's outputs.
class DecisionReader {
 public:
  explicit DecisionReader(const Manifest& manifest);

  // R, the decisions per token.
  std::int64_t rows() const { return rows_; }
  // Overflow counters of a row of the cache.
  std::int64_t overflows() const { return overflows_; }
  // Names of the outputs in which a whole-step graph reports its decisions.
  std::vector<std::string> outputs() const;

  // Throws Error for forced decisions [R, n] that no router can make.
  void check_forced(const std::vector<std::int64_t>& forced, std::int64_t tokens) const;
  // The decisions of consecutive chunks of one row as one object.
  Decisions joined(const std::vector<Decisions>& parts) const;
  // Reads the decisions of a whole-step graph. Throws Error for a score that is NaN, RouteError for an overflow where
  // the contract calls it an error.
  Read read(Binding& binding, const Graph& graph, const ReadFor& of) const;
  // The decisions for one row's tokens, n, from [R, S] values whose rows lie ``step`` apart.
  Decisions of_row(const std::int64_t* choices, const float* scores, const float* margins, std::int64_t step,
                   std::int64_t tokens, const std::vector<std::uint8_t>& active) const;
  // Decisions without routers: all tokens of a row run in the active layers.
  Decisions unrouted(const std::vector<std::uint8_t>& active, std::int64_t tokens) const;
  // The entries [places] and the decisions of the first tokens of a row's run; ``decisions`` are those of all its
  // tokens, null without routers. None if their entries do not come first in every cache, or their overflow is not
  // known.
  std::optional<Read> first(const Decisions* decisions, std::int64_t tokens,
                            const std::vector<std::uint8_t>& active) const;
  // How many layers each token ran; a layer counts once per visit.
  std::vector<std::int64_t> layers_run(const Decisions& decisions) const;

 private:
  struct Values;
  void check_scores(const Values& values, const ReadFor& of) const;
  void check_overflow(const std::vector<std::int64_t>& overflow, const ReadFor& of) const;
  std::vector<std::int64_t> entries(const std::vector<std::int64_t>& choices, const ReadFor& of) const;

  const Manifest& manifest_;
  const LayerRouting* layers_;
  const PathRouting* paths_;
  std::int64_t rows_ = 0, overflows_ = 0;
};

}  // namespace dynexport
