// TensorRT as a backend, in a shared object of its own.
#pragma once

#include <memory>

#include "dynexport/engine.hpp"

namespace dynexport {

// Opens the backend "tensorrt" or "tensorrt-rtx". Throws Error when the bundle cannot run on it.
std::shared_ptr<Backend> open_tensorrt_backend(const Bundle& bundle, const BackendOptions& options);

}  // namespace dynexport
