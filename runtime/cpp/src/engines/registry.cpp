// Opens the backend that runs a bundle's graphs: ONNX Runtime, or TensorRT on a GPU.
#include <string>

#include "dynexport/engine.hpp"
#include "dynexport/error.hpp"
#include "engines/onnxruntime.hpp"
#include "engines/tensorrt.hpp"

namespace dynexport {
namespace {

// ONNX Runtime itself has no limit: it starts threads until memory runs out.
constexpr int kMostThreads = 256;

}  // namespace

std::shared_ptr<Backend> open_backend(std::shared_ptr<const Bundle> bundle, const BackendOptions& options) {
  const std::string& kind = options.kind;
  const bool tensorrt = kind == "tensorrt" || kind == "tensorrt-rtx";
  if (!tensorrt && kind != "onnxruntime" && kind != "onnxruntime-cuda")
    throw Error("backend: expected onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, found " + shown(kind));
  if (options.threads < 0 || options.threads > kMostThreads)
    throw Error("threads: expected 1.." + std::to_string(kMostThreads) + ", found " + std::to_string(options.threads));
  if (tensorrt) return open_tensorrt_backend(*bundle, options);
  return open_onnxruntime_backend(std::move(bundle), options, kind == "onnxruntime-cuda");
}

}  // namespace dynexport
