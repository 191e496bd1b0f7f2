// Time limits in seconds.
#pragma once

#include <algorithm>
#include <chrono>

#include "dynexport/work.hpp"

namespace dynexport {

// Longer times would overflow a clock.
constexpr double kLongestSeconds = 1e9;

// A number of seconds from 0 to the longest.
inline Clock::duration duration_of(double seconds) {
  const double bounded = seconds > 0 ? std::min(seconds, kLongestSeconds) : 0.0;
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

inline double seconds_between(Clock::time_point begun, Clock::time_point ended) {
  return std::chrono::duration<double>(ended - begun).count();
}

}  // namespace dynexport
