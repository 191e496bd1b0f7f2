#include "engines/tensorrt/driver.hpp"

#include <dlfcn.h>

#include <string>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

constexpr int kNoMemory = 2;

}  // namespace

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw Error("no NVIDIA driver: libcuda.so.1 is not found");
#define DYNEXPORT_FIND(name, exported, parameters)                   \
  name = reinterpret_cast<decltype(name)>(dlsym(library, exported)); \
  if (name == nullptr) throw Error("the NVIDIA driver is too old: it has no " exported);
  DYNEXPORT_DRIVER_FUNCTIONS(DYNEXPORT_FIND)
#undef DYNEXPORT_FIND
  DYNEXPORT_CALL(*this, cuInit, 0);
}

const Driver& Driver::get() {
  static const Driver driver;  // tried again when it fails
  return driver;
}

void Driver::check(const char* function, int code) const {
  if (code == 0) return;
  if (code == kNoMemory) {
    throw Error(std::string(function) +
                ": the GPU has not enough memory; lower the batch, or convert with a smaller --max-length");
  }
  const char* text = nullptr;
  cuGetErrorString(code, &text);
  throw Error(std::string(function) + ": CUDA error " + std::to_string(code) + ": " +
              (text == nullptr ? "unknown" : text));
}

}  // namespace dynexport::tensorrt
