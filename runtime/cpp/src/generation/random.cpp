// numpy's SeedSequence and PCG64 (XSL-RR, 128 bits of state).
#include "generation/random.hpp"

#include <array>
#include <random>
#include <vector>

namespace dynexport {
namespace {

constexpr std::size_t kPool = 4;
using Pool = std::array<std::uint32_t, kPool>;

// A hash whose constant changes with every use.
class Hash {
 public:
  Hash(std::uint32_t constant, std::uint32_t factor) : constant_(constant), factor_(factor) {}

  std::uint32_t operator()(std::uint32_t value) {
    value ^= constant_;
    constant_ *= factor_;
    value *= constant_;
    return value ^ (value >> 16U);
  }

 private:
  std::uint32_t constant_, factor_;
};

std::uint32_t mixed(std::uint32_t left, std::uint32_t right) {
  const std::uint32_t value = 0xca01f9ddU * left - 0x4973f715U * right;
  return value ^ (value >> 16U);
}

// The words of a seed, padded to the pool's size because an index follows.
std::vector<std::uint32_t> entropy(std::optional<std::uint64_t> seed) {
  std::vector<std::uint32_t> words(kPool, 0);
  if (seed) {
    words[0] = static_cast<std::uint32_t>(*seed);
    words[1] = static_cast<std::uint32_t>(*seed >> 32U);
    return words;
  }
  std::random_device device;
  for (std::uint32_t& word : words) word = device();
  return words;
}

Pool pool_of(const std::vector<std::uint32_t>& words) {
  Hash hash(0x43b0d7e5U, 0x931e8875U);
  Pool pool{};
  for (std::size_t place = 0; place < kPool; ++place) pool[place] = hash(words[place]);
  for (std::size_t from = 0; from < kPool; ++from) {
    for (std::size_t to = 0; to < kPool; ++to) {
      if (from != to) pool[to] = mixed(pool[to], hash(pool[from]));
    }
  }
  for (std::size_t from = kPool; from < words.size(); ++from) {
    for (std::uint32_t& value : pool) value = mixed(value, hash(words[from]));
  }
  return pool;
}

}  // namespace

RandomSequence::RandomSequence(std::optional<std::uint64_t> seed, std::uint32_t index) {
  std::vector<std::uint32_t> words = entropy(seed);
  words.push_back(index);
  const Pool pool = pool_of(words);
  Hash hash(0x8b51f9ddU, 0x58f38dedU);
  std::array<std::uint64_t, 4> state{};
  for (std::size_t place = 0; place < 2 * state.size(); ++place) {
    state[place / 2] |= static_cast<std::uint64_t>(hash(pool[place % kPool])) << (place % 2 * 32U);
  }
  increment_ = (((static_cast<Wide>(state[2]) << 64U) | state[3]) << 1U) | 1U;
  step();
  state_ += (static_cast<Wide>(state[0]) << 64U) | state[1];
  step();
}

RandomSequence::Wide RandomSequence::step() {
  constexpr Wide kFactor = (static_cast<Wide>(2549297995355413924ULL) << 64U) | 4865540595714422341ULL;
  state_ = state_ * kFactor + increment_;
  return state_;
}

double RandomSequence::next() {
  const Wide state = step();
  const auto folded = static_cast<std::uint64_t>(state >> 64U) ^ static_cast<std::uint64_t>(state);
  const auto turn = static_cast<unsigned>(state >> 122U);
  const std::uint64_t value = (folded >> turn) | (folded << ((64U - turn) & 63U));
  return static_cast<double>(value >> 11U) * 0x1.0p-53;
}

}  // namespace dynexport
