// The routing contract in a manifest, which no runtime needs (docs/routing-contract.md): it is checked, not kept.
#pragma once

#include "bundle/fields.hpp"

namespace dynexport {

// Throws Error when a contract is not one that Python reads (runtime/bundle/contract.py). Returns true.
bool check_contract(const Value& value);

}  // namespace dynexport
