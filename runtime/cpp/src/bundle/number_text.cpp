// Python's repr of a float.
#include "bundle/number_text.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace dynexport {
namespace {

// Python writes an exponent below 1e-4 and from 1e16.
constexpr int kSmallest = -4, kLargest = 16;

}  // namespace

std::string number_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  std::array<char, 64> buffer{};
  char* const end = buffer.data() + buffer.size();
  std::string text(buffer.data(), std::to_chars(buffer.data(), end, value, std::chars_format::scientific).ptr);
  const int exponent = std::atoi(text.c_str() + text.find('e') + 1);
  if (exponent < kSmallest || exponent >= kLargest) return text;
  text.assign(buffer.data(), std::to_chars(buffer.data(), end, value, std::chars_format::fixed).ptr);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

}  // namespace dynexport
