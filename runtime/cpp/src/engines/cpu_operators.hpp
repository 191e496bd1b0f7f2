// Where the library of dynexport's CPU operators is.
#pragma once

#include <string>

namespace dynexport {

// The library at ``given``, else the one that the environment's DYNEXPORT_CPU_OPERATORS names, else the one beside this
// library; empty where there is none, or the variable is empty. Throws Error when ``given`` or the variable names no
// file.
std::string cpu_operators(const std::string& given);

}  // namespace dynexport
