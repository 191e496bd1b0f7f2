#include "engines/tensorrt/driver.hpp"

#include <dlfcn.h>

#include <string>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

DriverLibrary DriverLibrary::open() {
  DriverLibrary library;
  library.handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library.handle == nullptr) throw Error("no NVIDIA driver: libcuda.so.1 is not found");
  library.text_of = reinterpret_cast<int (*)(int, const char**)>(library.find("cuGetErrorString"));
  return library;
}

void* DriverLibrary::find(const char* exported) const {
  void* function = dlsym(handle, exported);
  if (function == nullptr) throw Error(std::string("the NVIDIA driver is too old: it has no ") + exported);
  return function;
}

void DriverLibrary::refuse(const char* function, int code) const {
  constexpr int kNoMemory = 2;
  std::string message = function;
  if (code == kNoMemory) {
    message += ": the GPU has not enough memory; lower the batch, or convert with a smaller --max-length";
  } else {
    const char* text = nullptr;
    text_of(code, &text);
    message += ": CUDA error " + std::to_string(code) + ": " + (text == nullptr ? "unknown" : text);
  }
  throw Error(message);
}

const Driver& Driver::get() {
  static const Driver driver;  // tried again when it fails
  return driver;
}

}  // namespace dynexport::tensorrt
