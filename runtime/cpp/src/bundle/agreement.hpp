// Checks that the sections of a manifest agree with each other.
#pragma once

#include <string>

#include "bundle/sections.hpp"

namespace dynexport {

// Throws Error, which names ``where``, when they do not.
void check_agreement(const Manifest& manifest, const CostLayers& cost_layers, const std::string& where);

}  // namespace dynexport
