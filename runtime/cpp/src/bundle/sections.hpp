// Reads the sections of a manifest: each function reads one, and checks what it can without the others.
#pragma once

#include "bundle/fields.hpp"
#include "dynexport/manifest.hpp"

namespace dynexport {

Model read_model(const Value& value);
Depth read_depth(const Value& value);
Program read_program(const Value& value);
Graph read_graph(const Value& value);
Cache read_cache(const Value& value);
Routing read_routing(const Value& value);
std::optional<Drafting> read_drafting(const Value& value);
Limits read_limits(const Value& value);
Tokens read_tokens(const Value& value);
File read_file(const Value& value);

// The lengths of the lists of the section on costs: of layers, and of decisions about parts of layers; 0 where absent.
struct CostSizes {
  std::size_t layers = 0, kv_of_layers = 0, flops_of_layers = 0, parts = 0;
};

// Sections that no runtime needs: they are checked, and what other sections must agree with is returned.
CostSizes read_cost_sizes(const Value& value);
bool check_cache_text(const Value& value);
bool check_source(const Value& value);

}  // namespace dynexport
