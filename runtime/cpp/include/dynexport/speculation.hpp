// Options of drafts: who drafts tokens that the full model verifies in one call, and how many.
#pragma once

#include <cstdint>
#include <optional>

#include "dynexport/manifest.hpp"

namespace dynexport {

struct Speculation {
  std::int64_t most = 8;  // most drafts of a row in a step, 1 to kMostDrafts
  std::optional<Depth>
      depth;            // the depth that drafts; none: the last tokens are looked up in the text and the n-gram table
  bool always = false;  // every step drafts as many tokens as it can, whether that pays or not

  // Throws Error for a number out of its range.
  void check() const;
  // What a bundle's manifest says; the defaults where it says nothing. Throws Error for layers that no depth of the
  // bundle has and no graph of it can choose.
  static Speculation of(const Manifest& manifest);
};

}  // namespace dynexport
