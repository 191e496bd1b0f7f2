// Random numbers equal those that numpy drew (numpy 2, default_rng(SeedSequence(seed, spawn_key=(index,)))).
#include <doctest/doctest.h>

#include <array>
#include <cstdint>

#include "generation/random.hpp"

using dynexport::RandomSequence;

namespace {

void check(std::uint64_t seed, std::uint32_t index, const std::array<double, 3>& expected) {
  RandomSequence random(seed, index);
  for (const double value : expected) CHECK(random.next() == value);
}

}  // namespace

TEST_CASE("a seed and an index give numpy's numbers") {
  check(0, 0, {0.9429375528828794, 0.3163371523854981, 0.7223425886498254});
  check(1, 0, {0.6990345474368357, 0.17433552137309583, 0.6451185321972944});
  check(1, 3, {0.1141246529720964, 0.8533637052303807, 0.5510678421044461});
  check(9223372036854775813U, 2, {0.5195988874154139, 0.3842393947218641, 0.13865943509626322});
  check(12345678901234U, 4000000000U, {0.3393014973638443, 0.06293463821362821, 0.21674198273102108});
}

TEST_CASE("without a seed the numbers are new") {
  RandomSequence one(std::nullopt, 0), other(std::nullopt, 0);
  CHECK(one.next() != other.next());
}
