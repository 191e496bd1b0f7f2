// Checks that the sections of a manifest agree with each other.
#pragma once

#include <string>

#include "dynexport/manifest.hpp"

namespace dynexport {

// Throws Error, which names ``where``, when they do not. ``cost_layers`` is the number of layers that the cost has.
void check_agreement(const Manifest& manifest, std::size_t cost_layers, const std::string& where);

}  // namespace dynexport
