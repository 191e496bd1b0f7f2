// Checks of arguments.
#include "execution/checks.hpp"

#include "dynexport/error.hpp"

namespace dynexport {

std::int64_t checked_count(const std::string& name, std::int64_t value, std::int64_t least,
                           std::optional<std::int64_t> most) {
  if (value >= least && (!most || value <= *most)) return value;
  const std::string range =
      most ? std::to_string(least) + ".." + std::to_string(*most) : "at least " + std::to_string(least);
  throw Error(name + ": expected " + range + ", found " + std::to_string(value));
}

void check_ids(const std::string& name, const std::vector<std::int64_t>& ids, std::int64_t vocabulary) {
  for (const std::int64_t id : ids)
    if (id < 0 || id >= vocabulary)
      throw Error(name + ": expected token ids 0.." + std::to_string(vocabulary - 1) + ", found " + std::to_string(id));
}

void check_for_rows(const std::string& name, std::size_t values, std::size_t rows) {
  if (values != rows)
    throw Error(name + ": expected " + std::to_string(rows) + ", one for each row, found " + std::to_string(values));
}

std::string listed(const std::vector<std::int64_t>& values) {
  constexpr std::size_t kShown = 80;
  std::string text = "[";
  for (std::size_t i = 0; i < values.size() && text.size() <= kShown; ++i)
    text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  text += "]";
  return text.size() <= kShown ? text : text.substr(0, kShown) + "..";
}

}  // namespace dynexport
