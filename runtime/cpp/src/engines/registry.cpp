// Opens the backend that runs a bundle's graphs: ONNX Runtime, or TensorRT on a GPU.
#include <string>

#include "dynexport/bundle.hpp"
#include "dynexport/engine.hpp"
#include "dynexport/error.hpp"
#include "engines/onnxruntime.hpp"
#include "engines/tensorrt.hpp"

namespace dynexport {
namespace {

// ONNX Runtime itself has no limit: it starts threads until memory runs out.
constexpr int kMostThreads = 256;

void check_weights(const Bundle& bundle, const std::string& kind, const std::string& weights) {
  if (weights != "packed" && weights != "mapped")
    throw Error("weights: expected packed, mapped, found " + shown(weights));
  if (weights == "packed") return;
  if (kind != "onnxruntime")
    throw Error("weights: expected packed on " + kind + ", found " + weights + "; the CPU alone can map them");
  const Manifest& manifest = bundle.manifest();
  if (manifest.precision != "fp32" || manifest.target != "onnxruntime")
    throw Error("weights: expected packed for " + bundle.path().string() + ", which is " + manifest.precision +
                " for " + manifest.target + ", found " + weights + "; fp32 alone is fast enough without packing");
}

}  // namespace

std::shared_ptr<Backend> open_backend(std::shared_ptr<const Bundle> bundle, const BackendOptions& options) {
  const std::string& kind = options.kind;
  const bool tensorrt = kind == "tensorrt" || kind == "tensorrt-rtx";
  if (!tensorrt && kind != "onnxruntime" && kind != "onnxruntime-cuda")
    throw Error("backend: expected onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, found " + shown(kind));
  if (options.threads < 0 || options.threads > kMostThreads)
    throw Error("threads: expected 1.." + std::to_string(kMostThreads) + ", found " + std::to_string(options.threads));
  check_weights(*bundle, kind, options.weights);
  if (tensorrt) return open_tensorrt_backend(*bundle, options);
  return open_onnxruntime_backend(std::move(bundle), options, kind == "onnxruntime-cuda");
}

}  // namespace dynexport
