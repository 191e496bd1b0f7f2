// API keys.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace service {

// Reads a file with keys, one per line. Throws Error for a file that cannot be read or has none.
std::vector<std::string> read_keys(const std::filesystem::path& path);

// Throws ApiError unless the header Authorization has one of the keys. All keys are compared, each in constant time, so
// that the time says nothing about them. Without keys everybody is let in.
void check_key(const std::vector<std::string>& keys, const std::string& authorization);

}  // namespace service
