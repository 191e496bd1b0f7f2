// Where the library of dynexport's CPU operators is.
#include "engines/cpu_operators.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

constexpr const char* kVariable = "DYNEXPORT_CPU_OPERATORS";
constexpr const char* kName = "libdynexport_cpu.so";

bool is_file(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}

std::string existing(const std::string& path, const std::string& told_by) {
  if (is_file(path)) return path;
  throw Error(told_by + ": expected the library of CPU operators at " + path + ", found none");
}

}  // namespace

std::string cpu_operators(const std::string& given) {
  if (!given.empty()) return existing(given, "plugins");
  if (const char* told = std::getenv(kVariable)) return *told == '\0' ? "" : existing(told, kVariable);
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void*>(&cpu_operators), &here) == 0 || here.dli_fname == nullptr) return "";
  const auto beside = std::filesystem::path(here.dli_fname).parent_path() / kName;
  return is_file(beside) ? beside.string() : "";
}

}  // namespace dynexport
