// Checks of arguments; a wrong one throws a one-line Error that names it (Python's runtime/bundle/checks.py).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dynexport {

// Returns an argument that must be from ``least`` to ``most``.
std::int64_t checked_count(const std::string& name, std::int64_t value, std::int64_t least = 1,
                           std::optional<std::int64_t> most = std::nullopt);

// Throws Error for an id outside of the vocabulary.
void check_ids(const std::string& name, const std::vector<std::int64_t>& ids, std::int64_t vocabulary);

// Throws Error unless there is one value for each row.
void check_for_rows(const std::string& name, std::size_t values, std::size_t rows);

// The numbers in brackets, of at most 80 characters.
std::string listed(const std::vector<std::int64_t>& values);

}  // namespace dynexport
