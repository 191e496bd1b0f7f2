// Checks that the sections of a manifest agree with each other.
#pragma once

#include <string>

#include "bundle/sections.hpp"
#include "dynexport/manifest.hpp"

namespace dynexport {

// Throws Error, which names ``where``, when they do not. ``cost`` has the numbers of items in the section on costs.
void check_agreement(const Manifest& manifest, const CostSizes& cost, const std::string& where);

}  // namespace dynexport
