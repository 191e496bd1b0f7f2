#include "engines/tensorrt/gpu.hpp"

#include <array>

#include "dynexport/error.hpp"
#include "engines/tensorrt/driver.hpp"

namespace dynexport::tensorrt {

Gpu find_gpu() {
  constexpr int kMajor = 75, kMinor = 76;
  const Driver& driver = Driver::get();
  int version = 0, count = 0, device = 0, major = 0, minor = 0;
  std::array<char, 256> name = {};
  driver.cuDriverGetVersion(&version);
  driver.cuDeviceGetCount(&count);
  if (count == 0) throw Error("the driver shows no device; see CUDA_VISIBLE_DEVICES");
  driver.cuDeviceGet(&device, 0);
  driver.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device);
  driver.cuDeviceGetAttribute(&major, kMajor, device);
  driver.cuDeviceGetAttribute(&minor, kMinor, device);
  return {name.data(), std::to_string(major) + "." + std::to_string(minor),
          std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10)};
}

}  // namespace dynexport::tensorrt
