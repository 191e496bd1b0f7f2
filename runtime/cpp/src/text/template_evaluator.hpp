// Runs a chat template on variables.
#pragma once

#include <string>

#include "text/template_parser.hpp"
#include "text/template_value.hpp"

namespace dynexport::text {

// Returns a template's text for variables. Throws Error where the template fails, or uses what is not known.
std::string rendered(const Node& root, const Dict& variables);

}  // namespace dynexport::text
