// ONNX Runtime as a backend.
#pragma once

#include <memory>

#include "dynexport/engine.hpp"

namespace dynexport {

// Opens ONNX Runtime for a bundle's graphs, on the CPU or, with ``cuda``, on a GPU; caches are in host memory for both.
// Throws Error when the library is missing, too old, or lacks the provider.
std::shared_ptr<Backend> open_onnxruntime_backend(std::shared_ptr<const Bundle> bundle, const BackendOptions& options,
                                                  bool cuda);

}  // namespace dynexport
