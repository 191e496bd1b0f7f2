#include "dynexport/error.hpp"
namespace dynexport {
Error::Error(std::string_view message) : std::runtime_error(one_line(message)) {}
std::string one_line(std::string_view text) { return std::string(text); }
std::string shown(std::string_view text) { return "'" + std::string(text) + "'"; }
}  // namespace dynexport
