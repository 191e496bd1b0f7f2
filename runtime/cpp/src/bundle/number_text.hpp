// Floating point numbers, written as Python writes them.
#pragma once

#include <string>

namespace dynexport {

// Returns the shortest text that reads back as the number, such as "1.0", "1e-06" or "nan".
std::string number_text(double value);

}  // namespace dynexport
