// Steps of a tokenizer.json that consist of other steps.
#pragma once

#include <string>
#include <vector>

#include "text/fields.hpp"

namespace dynexport::text {

// Reads the steps of a part's list; a Sequence may contain others, to a limit.
template <typename Step>
std::vector<Step> read_steps(const Fields& part, const char* list, int depth, Step (*read)(const Fields&, int)) {
  constexpr int kDeepest = 8;
  constexpr std::size_t kMost = 64;
  if (depth >= kDeepest) throw part.unknown("so deep a Sequence");
  std::vector<Step> steps;
  for (const Fields& entry : part.parts(list, kMost)) steps.push_back(read(entry, depth + 1));
  return steps;
}

}  // namespace dynexport::text
