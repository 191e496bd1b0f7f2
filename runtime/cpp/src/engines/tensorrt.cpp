// TensorRT as a backend: this build has none.
#include "engines/tensorrt.hpp"

#include "dynexport/error.hpp"

namespace dynexport {

std::shared_ptr<Backend> open_tensorrt_backend(std::shared_ptr<const Bundle>, const BackendOptions& options) {
  throw Error("backend: expected one that this build has, found " + shown(options.kind) + "; use onnxruntime");
}

}  // namespace dynexport
