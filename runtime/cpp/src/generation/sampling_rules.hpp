// The ranges of the sampling options that are numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dynexport/sampler.hpp"

namespace dynexport {

// A number: its name, its field, its range, and the range in words.
struct NumberRule {
  const char* name;
  double Sampling::*field;
  bool (*holds)(double);
  const char* expected;
};

// A count, from 0.
struct CountRule {
  const char* name;
  std::int64_t Sampling::*field;
  std::int64_t most;
  const char* expected;
};

const std::vector<NumberRule>& number_rules();
const std::vector<CountRule>& count_rules();

// Throws Error: ``field`` is not what was expected.
[[noreturn]] void refuse_option(const std::string& field, const std::string& expected, const std::string& found);

}  // namespace dynexport
