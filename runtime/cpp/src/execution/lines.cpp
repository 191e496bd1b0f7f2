// Lines of tokens.
#include "execution/lines.hpp"

#include <cstring>
#include <map>
#include <numeric>
#include <utility>

#include "dynexport/error.hpp"
#include "execution/checks.hpp"

namespace dynexport {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::size_t stride(const Array& lines) { return at(width_of(lines)) * size_of(lines.type); }

}  // namespace

Indices chosen_of(const Indices& values, const Indices& indices) {
  Indices found;
  found.reserve(indices.size());
  for (const std::int64_t index : indices) found.push_back(values[at(index)]);
  return found;
}

Indices counted_to(std::int64_t count) {
  Indices found(at(count));
  std::iota(found.begin(), found.end(), 0);
  return found;
}

Groups grouped(const Indices& values) {
  std::map<std::int64_t, Indices> groups;
  for (std::size_t i = 0; i < values.size(); ++i) groups[values[i]].push_back(static_cast<std::int64_t>(i));
  return {groups.begin(), groups.end()};
}

std::int64_t width_of(const Array& lines) { return lines.shape.empty() ? 1 : lines.shape.back(); }

Array gathered(const Array& from, const std::vector<std::int64_t>& rows, std::vector<std::int64_t> shape) {
  const std::size_t bytes = stride(from);
  Array made{from.type, std::move(shape), std::vector<std::uint8_t>(rows.size() * bytes)};
  for (std::size_t i = 0; i < rows.size() && bytes > 0; ++i)
    std::memcpy(made.bytes.data() + i * bytes, from.bytes.data() + at(rows[i]) * bytes, bytes);
  return made;
}

void scatter(const Tensor& result, const std::vector<std::int64_t>& rows, Array& into, const std::string& what) {
  const std::size_t bytes = stride(into);
  if (result.type != into.type || result.bytes() != rows.size() * bytes)
    throw Error(what + ": expected " + std::string(name_of(into.type)) + " " +
                listed({static_cast<std::int64_t>(rows.size()), width_of(into)}) + ", found " +
                std::string(name_of(result.type)) + " " + listed(result.shape));
  for (std::size_t i = 0; i < rows.size() && bytes > 0; ++i)
    std::memcpy(into.bytes.data() + at(rows[i]) * bytes, result.as<std::uint8_t>() + i * bytes, bytes);
}

Array lines_like(const Tensor& result, std::int64_t n) {
  const std::int64_t width = result.shape.empty() ? 1 : result.shape.back();
  return Array{result.type, {n, width}, std::vector<std::uint8_t>(at(n) * at(width) * size_of(result.type))};
}

}  // namespace dynexport
