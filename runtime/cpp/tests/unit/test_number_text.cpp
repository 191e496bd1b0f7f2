// Numbers in errors are written as in Python.
#include <doctest/doctest.h>

#include <cmath>

#include "bundle/number_text.hpp"

using dynexport::number_text;

TEST_CASE("numbers as in Python") {
  CHECK(number_text(1) == "1.0");
  CHECK(number_text(-0.5) == "-0.5");
  CHECK(number_text(1e15) == "1000000000000000.0");
  CHECK(number_text(1e16) == "1e+16");
  CHECK(number_text(0.0001) == "0.0001");
  CHECK(number_text(0.00001) == "1e-05");
  CHECK(number_text(1.5e300) == "1.5e+300");
  CHECK(number_text(std::nan("")) == "nan");
  CHECK(number_text(-INFINITY) == "-inf");
}
