// The functions of the CUDA driver that running engines needs, declared here because its library is opened at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynexport::tensorrt {

using DevicePointer = std::uint64_t;

// The driver's CUDA_MEMCPY2D.
struct Copy2d {
  std::size_t source_x = 0, source_y = 0;
  int source_kind = 0;
  const void* source_host = nullptr;
  DevicePointer source_device = 0;
  void* source_array = nullptr;
  std::size_t source_pitch = 0;
  std::size_t x = 0, y = 0;
  int kind = 0;
  void* host = nullptr;
  DevicePointer device = 0;
  void* array = nullptr;
  std::size_t pitch = 0;
  std::size_t width = 0, height = 0;
};

constexpr int kHostMemory = 1, kDeviceMemory = 2;

// Name in this table, exported name, parameters.
#define DYNEXPORT_DRIVER_FUNCTIONS(F)                                                              \
  F(cuInit, "cuInit", (unsigned))                                                                  \
  F(cuGetErrorString, "cuGetErrorString", (int, const char**))                                     \
  F(cuDriverGetVersion, "cuDriverGetVersion", (int*))                                              \
  F(cuDeviceGetCount, "cuDeviceGetCount", (int*))                                                  \
  F(cuDeviceGet, "cuDeviceGet", (int*, int))                                                       \
  F(cuDeviceGetName, "cuDeviceGetName", (char*, int, int))                                         \
  F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, int))                                \
  F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void**, int))                           \
  F(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))                              \
  F(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (void*))                                              \
  F(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (void**))                                               \
  F(cuMemAlloc, "cuMemAlloc_v2", (DevicePointer*, std::size_t))                                    \
  F(cuMemFree, "cuMemFree_v2", (DevicePointer))                                                    \
  F(cuMemAllocHost, "cuMemAllocHost_v2", (void**, std::size_t))                                    \
  F(cuMemFreeHost, "cuMemFreeHost", (void*))                                                       \
  F(cuMemsetD8Async, "cuMemsetD8Async", (DevicePointer, unsigned char, std::size_t, void*))        \
  F(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (DevicePointer, const void*, std::size_t, void*))   \
  F(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void*, DevicePointer, std::size_t, void*))         \
  F(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (DevicePointer, DevicePointer, std::size_t, void*)) \
  F(cuMemcpy2DUnaligned, "cuMemcpy2DUnaligned_v2", (const Copy2d*))                                \
  F(cuStreamCreate, "cuStreamCreate", (void**, unsigned))                                          \
  F(cuStreamDestroy, "cuStreamDestroy_v2", (void*))                                                \
  F(cuStreamSynchronize, "cuStreamSynchronize", (void*))                                           \
  F(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (void*, int))                                 \
  F(cuStreamEndCapture, "cuStreamEndCapture", (void*, void**))                                     \
  F(cuGraphInstantiate, "cuGraphInstantiateWithFlags", (void**, void*, unsigned long long))        \
  F(cuGraphLaunch, "cuGraphLaunch", (void*, void*))                                                \
  F(cuGraphDestroy, "cuGraphDestroy", (void*))                                                     \
  F(cuGraphExecDestroy, "cuGraphExecDestroy", (void*))

// The driver's library, opened once and never closed.
class Driver {
 public:
  // Throws Error when it is not found; the message is Python's reason for having no GPU.
  static const Driver& get();

#define DYNEXPORT_MEMBER(name, exported, parameters) int(*name) parameters = nullptr;
  DYNEXPORT_DRIVER_FUNCTIONS(DYNEXPORT_MEMBER)
#undef DYNEXPORT_MEMBER

  // Throws Error, with the function's name, for a code other than 0.
  void check(const char* function, int code) const;

 private:
  Driver();
};

// Calls a function of the driver, and throws Error when it fails.
#define DYNEXPORT_CALL(driver, name, ...) (driver).check(#name, (driver).name(__VA_ARGS__))

}  // namespace dynexport::tensorrt
