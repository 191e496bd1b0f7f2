// Largest values, exponentials and sums of rows.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "generation/row_math.hpp"

using dynexport::Row;

namespace {

Row row_of(const std::vector<float>& values) { return {values.data(), values.size()}; }

}  // namespace

TEST_CASE("the first of the largest numbers is found in rows of every length") {
  for (const std::size_t size : {1, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 4099}) {
    for (const std::size_t place : {std::size_t{0}, size / 2, size - 1}) {
      std::vector<float> values(size, -2.0F);
      values[place] = values[size - 1] = 3.0F;
      CHECK(dynexport::first_largest(row_of(values)) == place);
    }
  }
}

TEST_CASE("excluded tokens and NaN") {
  std::vector<float> values(2000, -INFINITY);
  CHECK(dynexport::first_largest(row_of(values)) == 0);
  values[1500] = -1e30F;
  CHECK(dynexport::first_largest(row_of(values)) == 1500);
  values[3] = INFINITY;
  CHECK(dynexport::first_largest(row_of(values)) == 3);
  values[1999] = std::numeric_limits<float>::quiet_NaN();
  CHECK(dynexport::first_largest(row_of(values)) == 1999);
}

TEST_CASE("weights are exponentials, padded with zeros") {
  std::vector<float> values;
  for (int step = 0; step < 1000; ++step) values.push_back(-0.1F * static_cast<float>(step));
  values.push_back(-INFINITY);
  for (const float temperature : {1.0F, 0.5F, 3.0F}) {
    const std::vector<float> weights = dynexport::weights_of(row_of(values), 0.0F, temperature);
    CHECK(weights.size() == 1024);
    for (std::size_t place = 0; place < weights.size(); ++place) {
      const double exact = place < values.size() ? std::exp(static_cast<double>(values[place] / temperature)) : 0.0;
      CHECK(std::abs(static_cast<double>(weights[place]) - exact) <= 2e-7 * exact + 2e-38);
    }
  }
}

TEST_CASE("the logarithm of a sum of exponentials") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> values(5000);
  double sum = 0;
  for (float& value : values) sum += std::exp(static_cast<double>(value = normal(random)));
  const float largest = values[dynexport::first_largest(row_of(values))];
  CHECK(dynexport::log_of_sum(row_of(values), largest) == doctest::Approx(std::log(sum)).epsilon(1e-7));
}
