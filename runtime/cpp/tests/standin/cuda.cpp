// A stand-in for the CUDA driver: devices, contexts and memory. It is as strict as a driver, where that is known:
// memory is checked for bounds and for use after it was freed, and calls need a current context. The driver's header
// declares the functions, so that their names and parameters are the driver's.
#include <cstddef>
#include <cstdlib>

#include "cuda_state.hpp"
#include "engines/tensorrt/driver.hpp"

using namespace standin;  // NOLINT(google-build-using-namespace)

// The library declares this for itself; it has to be the driver's.
using dynexport::tensorrt::Copy2d;
static_assert(sizeof(Copy2d) == sizeof(CUDA_MEMCPY2D));
static_assert(offsetof(Copy2d, source_kind) == offsetof(CUDA_MEMCPY2D, srcMemoryType));
static_assert(offsetof(Copy2d, source_host) == offsetof(CUDA_MEMCPY2D, srcHost));
static_assert(offsetof(Copy2d, source_device) == offsetof(CUDA_MEMCPY2D, srcDevice));
static_assert(offsetof(Copy2d, source_pitch) == offsetof(CUDA_MEMCPY2D, srcPitch));
static_assert(offsetof(Copy2d, kind) == offsetof(CUDA_MEMCPY2D, dstMemoryType));
static_assert(offsetof(Copy2d, host) == offsetof(CUDA_MEMCPY2D, dstHost));
static_assert(offsetof(Copy2d, device) == offsetof(CUDA_MEMCPY2D, dstDevice));
static_assert(offsetof(Copy2d, pitch) == offsetof(CUDA_MEMCPY2D, dstPitch));
static_assert(offsetof(Copy2d, width) == offsetof(CUDA_MEMCPY2D, WidthInBytes));
static_assert(offsetof(Copy2d, height) == offsetof(CUDA_MEMCPY2D, Height));
static_assert(dynexport::tensorrt::kHostMemory == CU_MEMORYTYPE_HOST);
static_assert(dynexport::tensorrt::kDeviceMemory == CU_MEMORYTYPE_DEVICE);

extern "C" {

CUresult cuInit(unsigned) {
  return called("cuInit", false, [](State&) -> CUresult { return CUDA_SUCCESS; });
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  static const std::map<CUresult, const char*> texts = {
      {CUDA_ERROR_INVALID_VALUE, "invalid argument"},
      {CUDA_ERROR_OUT_OF_MEMORY, "out of memory"},
      {CUDA_ERROR_INVALID_CONTEXT, "invalid device context"},
      {CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"},
      {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"}};
  const auto found = texts.find(code);
  *text = found == texts.end() ? "unknown error" : found->second;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = standin::setting("devices", 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, int) {
  std::snprintf(name, static_cast<std::size_t>(size), "%s", standin::setting("gpu", std::string("Ada card")).c_str());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? standin::setting("major", 8)
                                                                     : standin::setting("minor", 9);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = reinterpret_cast<CUcontext>(&state());
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(int) { return CUDA_SUCCESS; }

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  return called("cuCtxPushCurrent", false, [&](State& s) -> CUresult {
    if (context != reinterpret_cast<CUcontext>(&s)) return CUDA_ERROR_INVALID_VALUE;
    ++contexts;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  return called("cuCtxPopCurrent", true, [&](State& s) -> CUresult {
    --contexts;
    *context = reinterpret_cast<CUcontext>(&s);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAlloc_v2(Address* address, std::size_t bytes) {
  return called("cuMemAlloc", true, [&](State& s) -> CUresult {
    if (s.capturing != nullptr) {
      s.broken = true;
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (s.used + bytes > standin::setting("memory", std::uint64_t{1} << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
    Block block{std::make_unique<char[]>(bytes + kAlignment), bytes};
    std::memset(block.held.get(), 0xff, bytes + kAlignment);
    *address = (reinterpret_cast<Address>(block.held.get()) + kAlignment - 1) / kAlignment * kAlignment;
    s.used += bytes;
    s.memory.emplace(*address, std::move(block));
    return CUDA_SUCCESS;
  });
}

CUresult cuMemFree_v2(Address address) {
  return called("cuMemFree", true, [&](State& s) -> CUresult {
    run_queue();
    const auto block = s.memory.find(address);
    if (block == s.memory.end()) return CUDA_ERROR_INVALID_VALUE;
    s.used -= block->second.bytes;
    s.memory.erase(block);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAllocHost_v2(void** host, std::size_t bytes) {
  return called("cuMemAllocHost", true, [&](State& s) -> CUresult {
    *host = std::malloc(bytes);
    s.hosts += 1;
    return *host == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
  });
}

CUresult cuMemFreeHost(void* host) {
  return called("cuMemFreeHost", true, [&](State& s) -> CUresult {
    run_queue();
    s.hosts -= 1;
    std::free(host);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemsetD8Async(Address address, unsigned char value, std::size_t bytes, CUstream) {
  return called("cuMemsetD8Async", true, [&](State&) -> CUresult {
    if (!inside(address, bytes)) return refused("cuMemsetD8Async outside of the device's memory");
    enqueue([=] { std::memset(at(address), value, bytes); });
    return CUDA_SUCCESS;
  });
}

CUresult cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, CUstream) {
  return called("cuMemcpyHtoDAsync", true, [&](State&) -> CUresult {
    if (!inside(to, bytes)) return refused("cuMemcpyHtoDAsync outside of the device's memory");
    move(at(to), from, bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, CUstream) {
  return called("cuMemcpyDtoHAsync", true, [&](State&) -> CUresult {
    if (!inside(from, bytes)) return refused("cuMemcpyDtoHAsync outside of the device's memory");
    move(to, at(from), bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, CUstream) {
  return called("cuMemcpyDtoDAsync", true, [&](State&) -> CUresult {
    if (!inside(to, bytes) || !inside(from, bytes)) return refused("cuMemcpyDtoDAsync outside of the device's memory");
    move(at(to), at(from), bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemcpy2DUnaligned_v2(const CUDA_MEMCPY2D* copy) {
  return called("cuMemcpy2DUnaligned", true, [&](State& s) -> CUresult {
    if (!s.queue.empty()) return CUDA_ERROR_NOT_READY;  // it is not in the stream, and would not wait for it
    if (copy->WidthInBytes > copy->dstPitch || copy->WidthInBytes > copy->srcPitch || copy->Height == 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    for (std::size_t line = 0; line < copy->Height; ++line) {
      const Address from = copy->srcDevice + line * copy->srcPitch, to = copy->dstDevice + line * copy->dstPitch;
      if ((copy->srcMemoryType != CU_MEMORYTYPE_HOST && !inside(from, copy->WidthInBytes)) ||
          (copy->dstMemoryType != CU_MEMORYTYPE_HOST && !inside(to, copy->WidthInBytes))) {
        return refused("cuMemcpy2DUnaligned outside of the device's memory");
      }
      const void* source = copy->srcMemoryType == CU_MEMORYTYPE_HOST
                               ? static_cast<const char*>(copy->srcHost) + line * copy->srcPitch
                               : at(from);
      std::memmove(copy->dstMemoryType == CU_MEMORYTYPE_HOST ? static_cast<char*>(copy->dstHost) + line * copy->dstPitch
                                                             : at(to),
                   source, copy->WidthInBytes);
    }
    return CUDA_SUCCESS;
  });
}

// For the stand-in for TensorRT: whether memory is the device's, and that a kernel failed.
int standin_inside(const void* address, std::size_t bytes) {
  const std::lock_guard<std::recursive_mutex> held(state().lock);
  return inside(reinterpret_cast<Address>(address), bytes) ? 1 : 0;
}

void standin_fail() { state().failed = true; }
}
