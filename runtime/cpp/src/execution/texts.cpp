// The texts of a cache's rows, as Python's runtime/execution/mark.py.
#include "execution/texts.hpp"

#include <algorithm>
#include <atomic>
#include <string>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

std::uint64_t next_tenant() {
  static std::atomic<std::uint64_t> tenants{0};
  return ++tenants;
}

}  // namespace

Texts::Texts(std::int64_t rows) : rows_(static_cast<std::size_t>(rows)) {
  for (Text& row : rows_) row.tenant = next_tenant();
}

void Texts::renew(std::int64_t row) {
  Text& text = rows_[static_cast<std::size_t>(row)];
  text.tenant = next_tenant();
  text.cuts.clear();
}

void Texts::truncate(std::int64_t row, std::int64_t tokens) {
  auto& cuts = rows_[static_cast<std::size_t>(row)].cuts;
  cuts.erase(std::remove_if(cuts.begin(), cuts.end(), [&](const auto& cut) { return cut.second >= tokens; }),
             cuts.end());
  cuts.emplace_back(++truncations_, tokens);
}

void Texts::check(const Mark& mark, std::int64_t position) const {
  const Text& text = rows_[static_cast<std::size_t>(mark.row)];
  const std::string row = "cache: row " + std::to_string(mark.row) + ": ";
  if (mark.tenant != text.tenant) throw Error(row + "expected a mark of this text, found one of an earlier text");
  for (const auto& [made, tokens] : text.cuts)
    if (mark.made < made && mark.position > tokens)
      throw Error(row + "expected a mark within its " + std::to_string(position) + " tokens, found one after " +
                  std::to_string(mark.position) + "; the row was truncated since");
}

}  // namespace dynexport
