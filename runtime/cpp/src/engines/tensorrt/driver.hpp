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

// The driver's library, and its text of an error code.
struct DriverLibrary {
  void* handle = nullptr;
  int (*text_of)(int, const char**) = nullptr;

  // Throws Error when it is not found; the message is Python's reason for having no GPU.
  static DriverLibrary open();
  void* find(const char* exported) const;
  [[noreturn]] void refuse(const char* function, int code) const;
};

// A function of the driver.
template <typename... Parameters>
class DriverFunction {
 public:
  DriverFunction(const DriverLibrary& library, const char* name, const char* exported)
      : library_(library), name_(name), function_(reinterpret_cast<int (*)(Parameters...)>(library.find(exported))) {}
  DriverFunction(const DriverLibrary& library, const char* name) : DriverFunction(library, name, name) {}

  // Throws Error, with the function's name, when it fails.
  void operator()(Parameters... values) const {
    const int code = function_(values...);
    if (code != 0) library_.refuse(name_, code);
  }
  // Returns its code.
  int code(Parameters... values) const { return function_(values...); }

 private:
  const DriverLibrary& library_;
  const char* name_;
  int (*function_)(Parameters...);
};

// The driver, opened once and never closed.
class Driver {
 public:
  // Throws Error when there is none, or it cannot be started.
  static const Driver& get();

  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

 private:
  Driver() { cuInit(0); }
  DriverLibrary library_ = DriverLibrary::open();

 public:
  DriverFunction<unsigned> cuInit{library_, "cuInit"};
  DriverFunction<int*> cuDriverGetVersion{library_, "cuDriverGetVersion"};
  DriverFunction<int*> cuDeviceGetCount{library_, "cuDeviceGetCount"};
  DriverFunction<int*, int> cuDeviceGet{library_, "cuDeviceGet"};
  DriverFunction<char*, int, int> cuDeviceGetName{library_, "cuDeviceGetName"};
  DriverFunction<int*, int, int> cuDeviceGetAttribute{library_, "cuDeviceGetAttribute"};
  DriverFunction<void**, int> cuDevicePrimaryCtxRetain{library_, "cuDevicePrimaryCtxRetain"};
  DriverFunction<int> cuDevicePrimaryCtxRelease{library_, "cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxRelease_v2"};
  DriverFunction<void*> cuCtxPushCurrent{library_, "cuCtxPushCurrent", "cuCtxPushCurrent_v2"};
  DriverFunction<void**> cuCtxPopCurrent{library_, "cuCtxPopCurrent", "cuCtxPopCurrent_v2"};
  DriverFunction<DevicePointer*, std::size_t> cuMemAlloc{library_, "cuMemAlloc", "cuMemAlloc_v2"};
  DriverFunction<DevicePointer> cuMemFree{library_, "cuMemFree", "cuMemFree_v2"};
  DriverFunction<void**, std::size_t> cuMemAllocHost{library_, "cuMemAllocHost", "cuMemAllocHost_v2"};
  DriverFunction<void*> cuMemFreeHost{library_, "cuMemFreeHost"};
  DriverFunction<DevicePointer, unsigned char, std::size_t, void*> cuMemsetD8Async{library_, "cuMemsetD8Async"};
  DriverFunction<DevicePointer, const void*, std::size_t, void*> cuMemcpyHtoDAsync{library_, "cuMemcpyHtoDAsync",
                                                                                   "cuMemcpyHtoDAsync_v2"};
  DriverFunction<void*, DevicePointer, std::size_t, void*> cuMemcpyDtoHAsync{library_, "cuMemcpyDtoHAsync",
                                                                             "cuMemcpyDtoHAsync_v2"};
  DriverFunction<DevicePointer, DevicePointer, std::size_t, void*> cuMemcpyDtoDAsync{library_, "cuMemcpyDtoDAsync",
                                                                                     "cuMemcpyDtoDAsync_v2"};
  DriverFunction<const Copy2d*> cuMemcpy2DUnaligned{library_, "cuMemcpy2DUnaligned", "cuMemcpy2DUnaligned_v2"};
  DriverFunction<void**, unsigned> cuStreamCreate{library_, "cuStreamCreate"};
  DriverFunction<void*> cuStreamDestroy{library_, "cuStreamDestroy", "cuStreamDestroy_v2"};
  DriverFunction<void*> cuStreamSynchronize{library_, "cuStreamSynchronize"};
  DriverFunction<void*, int> cuStreamBeginCapture{library_, "cuStreamBeginCapture", "cuStreamBeginCapture_v2"};
  DriverFunction<void*, void**> cuStreamEndCapture{library_, "cuStreamEndCapture"};
  DriverFunction<void**, void*, unsigned long long> cuGraphInstantiate{library_, "cuGraphInstantiate",
                                                                       "cuGraphInstantiateWithFlags"};
  DriverFunction<void*, void*> cuGraphLaunch{library_, "cuGraphLaunch"};
  DriverFunction<void*> cuGraphDestroy{library_, "cuGraphDestroy"};
  DriverFunction<void*> cuGraphExecDestroy{library_, "cuGraphExecDestroy"};
};

}  // namespace dynexport::tensorrt
