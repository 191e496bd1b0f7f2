// The kernels in plain C++, for processors without one of the other instruction sets.
#include <cmath>

#include "products.hpp"

namespace dynexport::cpu {
namespace {

template <class T>
struct Sixteen {
  T lane[kLanes];
};

template <class T, class Function>
Sixteen<T> each(Function&& of_lane) {
  Sixteen<T> made;
  for (int i = 0; i < kLanes; ++i) made.lane[i] = of_lane(i);
  return made;
}

struct Portable {
  using Floats = Sixteen<float>;
  using Integers = Sixteen<std::int32_t>;
  struct Bytes {
    std::uint8_t byte[4 * kLanes];
  };

  static Floats same(float value) {
    return each<float>([&](int) { return value; });
  }
  static Integers same(std::int32_t value) {
    return each<std::int32_t>([&](int) { return value; });
  }
  static Floats zeros() { return same(0.0F); }
  static Floats load(const float* values) {
    return each<float>([&](int i) { return values[i]; });
  }
  static Floats load(const std::uint16_t* halves) {
    return each<float>([&](int i) { return from_half(halves[i]); });
  }
  static Bytes load(const std::uint8_t* bytes) {
    Bytes made;
    std::memcpy(made.byte, bytes, sizeof(made.byte));
    return made;
  }
  static void store(float* to, const Floats& values) { std::memcpy(to, values.lane, sizeof(values.lane)); }
  static Bytes low(Bytes packed) {
    for (std::uint8_t& byte : packed.byte) byte &= 15;
    return packed;
  }
  static Bytes high(Bytes packed) {
    for (std::uint8_t& byte : packed.byte) byte >>= 4;
    return packed;
  }
  template <class T>
  static Sixteen<T> add(const Sixteen<T>& a, const Sixteen<T>& b) {
    return each<T>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Floats to_floats(const Integers& values) {
    return each<float>([&](int i) { return static_cast<float>(values.lane[i]); });
  }
  static Floats multiply(const Floats& a, float b) {
    return each<float>([&](int i) { return a.lane[i] * b; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Floats multiply(const Floats& a, const Floats& b) {
    return each<float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Floats divide(const Floats& a, const Floats& b) {
    return each<float>([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  template <class T>
  static Sixteen<T> max(const Sixteen<T>& a, const Sixteen<T>& b) {
    return each<T>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Floats min(const Floats& a, const Floats& b) {
    return each<float>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Floats nearest(const Floats& values) {
    return each<float>([&](int i) { return std::nearbyintf(values.lane[i]); });
  }
  static Floats times_power(const Floats& values, const Floats& power) {
    return each<float>([&](int i) { return std::ldexp(values.lane[i], static_cast<int>(power.lane[i])); });
  }
  static Integers magnitude_bits(const Floats& values) {
    Integers bits;
    std::memcpy(bits.lane, values.lane, sizeof(bits.lane));
    return each<std::int32_t>([&](int i) { return bits.lane[i] & 0x7FFFFFFF; });
  }
  static std::int32_t largest(const Integers& values) {
    std::int32_t most = values.lane[0];
    for (const std::int32_t value : values.lane) most = value > most ? value : most;
    return most;
  }
  static std::int32_t total(const Integers& values) {
    std::int32_t sum = 0;
    for (const std::int32_t value : values.lane) sum += value;
    return sum;
  }
  static float total(const Floats& values) {
    float sum = 0;
    for (const float value : values.lane) sum += value;
    return sum;
  }

  template <int kBits>
  static Integers dot(Integers sum, const Bytes& weights, const std::int8_t* four) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) sum.lane[i] += weights.byte[4 * i + j] * four[j];
    return sum;
  }

  static Integers round(const Floats& values, float factor, std::int8_t* to) {
    return each<std::int32_t>([&](int i) {
      to[i] = static_cast<std::int8_t>(std::lrintf(values.lane[i] * factor));
      return to[i];
    });
  }

  template <bool kBfloat16>
  static void load_pair(const std::uint16_t* values, Floats* first, Floats* second) {
    for (int i = 0; i < kLanes; ++i) {
      first->lane[i] = kBfloat16 ? from_bfloat16(values[2 * i]) : from_half(values[i]);
      second->lane[i] = kBfloat16 ? from_bfloat16(values[2 * i + 1]) : from_half(values[kLanes + i]);
    }
  }

  // The exponent is widened by a product that is exact, also for subnormal values.
  static float from_half(std::uint16_t half) {
    const std::uint32_t magnitude = half & 0x7FFFU, sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
    const std::uint32_t wide = magnitude << 13;
    const float value = magnitude >= 0x7C00U ? from_bits(wide | 0x7F800000U) : from_bits(wide) * 0x1p112F;
    return sign != 0 ? -value : value;
  }
};

}  // namespace

extern const Kernels kPortable = kernels<Portable>("portable");

}  // namespace dynexport::cpu
