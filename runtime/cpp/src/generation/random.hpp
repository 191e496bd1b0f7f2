// Random numbers that equal numpy's for the same seed.
#pragma once

#include <cstdint>
#include <optional>

namespace dynexport {

// The numbers of numpy's ``default_rng(SeedSequence(seed, spawn_key=(index,))).random()``: PCG64, seeded by numpy's
// hash of the seed and the index. No seed takes fresh entropy.
class RandomSequence {
 public:
  RandomSequence(std::optional<std::uint64_t> seed, std::uint32_t index);
  // The next number, in [0, 1).
  double next();

 private:
  __extension__ using Wide = unsigned __int128;
  Wide step();

  Wide state_ = 0, increment_ = 0;
};

}  // namespace dynexport
