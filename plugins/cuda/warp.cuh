// Constants of a warp, 32 threads that run together.
#pragma once

#include <cstdint>

namespace dynexport
{

constexpr int32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffU;

} // namespace dynexport
