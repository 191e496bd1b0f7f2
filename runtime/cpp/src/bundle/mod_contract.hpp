// The fields of Mixture-of-Depths in the routing contract.
#pragma once

#include "bundle/fields.hpp"

namespace dynexport {

// Throws Error for a field that is unknown, out of range, or excluded by another.
void check_mod(const Value& value);

}  // namespace dynexport
