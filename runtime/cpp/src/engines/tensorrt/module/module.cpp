// A TensorRT module: the few functions of TensorRT's C++ API that running engines needs, as a table of C functions.
// It is compiled once against TensorRT's headers and once against TensorRT-RTX's, whose classes differ.
#include "engines/tensorrt/module/module.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

namespace {

void tell(DynexportReason* why, const char* text) noexcept {
  const std::size_t length = std::min(std::strlen(text), sizeof(why->text) - 1);
  std::memcpy(why->text, text, length);
  why->text[length] = '\0';
}

// Keeps the first error since it was cleared: it is the cause, others follow from it.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR || text == nullptr) return;
    const std::lock_guard<std::mutex> held(lock_);
    if (first_.text[0] == '\0') tell(&first_, text);
  }
  void clear() noexcept {
    const std::lock_guard<std::mutex> held(lock_);
    first_.text[0] = '\0';
  }
  void say(DynexportReason* why) noexcept {
    const std::lock_guard<std::mutex> held(lock_);
    *why = first_;
  }

 private:
  std::mutex lock_;
  DynexportReason first_ = {};
};

}  // namespace

struct DynexportRuntime {
  Log log;
  void* library = nullptr;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
};

struct DynexportEngine {
  Log* log = nullptr;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

struct DynexportContext {
  Log* log = nullptr;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
};

namespace {

#if DYNEXPORT_TENSORRT_RTX
constexpr const char* kNames[] = {"libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
#else
#define DYNEXPORT_TEXT(x) #x
#define DYNEXPORT_NAME(major) "libnvinfer.so." DYNEXPORT_TEXT(major)
constexpr const char* kNames[] = {DYNEXPORT_NAME(NV_TENSORRT_MAJOR), "libnvinfer.so"};
#endif

template <typename Function>
Function find(void* library, const char* name) noexcept {
  return reinterpret_cast<Function>(dlsym(library, name));
}

// Global symbols, because libraries of plugins leave TensorRT's open. It stays loaded: it has threads and global
// objects.
void* open_library(const char* given, DynexportReason* why) noexcept {
  constexpr int kMode = RTLD_NOW | RTLD_GLOBAL;
  void* library = nullptr;
  if (given[0] != '\0') {
    library = dlopen(given, kMode);
  } else {
    for (const char* name : kNames) {
      if (library == nullptr) library = dlopen(name, kMode);
    }
  }
  if (library == nullptr) tell(why, dlerror());
  return library;
}

// By the one function that every version has; a number of TensorRT 8 has fewer digits.
bool read_version(void* library, int32_t version[4]) noexcept {
  const auto number = find<int32_t (*)()>(library, "getInferLibVersion");
  if (number == nullptr) return false;
  const int32_t found = number();
  const int32_t minors = found < 10000 ? 10 : 100;
  version[0] = found / (100 * minors);
  version[1] = found / 100 % minors;
  version[2] = found % 100;
  const auto build = find<int32_t (*)()>(library, "getInferLibBuildVersion");
  version[3] = build == nullptr ? 0 : build();
  return true;
}

DynexportRuntime* open(const char* path, int32_t version[4], DynexportReason* why) {
  std::fill_n(version, 4, 0);
  tell(why, "");
  void* library = open_library(path, why);
  if (library == nullptr) return nullptr;
  const auto create = find<void* (*)(void*, int32_t)>(library, "createInferRuntime_INTERNAL");
  if (create == nullptr || !read_version(library, version)) {
    tell(why, "it is not TensorRT's library: createInferRuntime_INTERNAL or getInferLibVersion is missing");
    std::fill_n(version, 4, 0);
  } else if (version[0] == NV_TENSORRT_MAJOR && version[1] == NV_TENSORRT_MINOR) {
    std::unique_ptr<DynexportRuntime> made(new (std::nothrow) DynexportRuntime);
    if (made != nullptr) {
      made->library = library;
      made->runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&made->log, NV_TENSORRT_VERSION)));
      if (made->runtime != nullptr) return made.release();
      made->log.say(why);
    }
    if (why->text[0] == '\0') tell(why, "it gives no runtime");
  }
  return nullptr;
}

void close(DynexportRuntime* runtime) { delete runtime; }

int load_plugins(DynexportRuntime* runtime, const char* path, DynexportReason* why) {
  runtime->log.clear();
  // Opened here first, because the error of dlopen names the missing symbol or file; the registry's does not.
  if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    tell(why, dlerror());
    return 0;
  }
  const auto registry = find<nvinfer1::IPluginRegistry* (*)()>(runtime->library, "getPluginRegistry");
  if (registry != nullptr && registry() != nullptr && registry()->loadLibrary(path) != nullptr) return 1;
  runtime->log.say(why);
  return 0;
}

DynexportEngine* deserialize(DynexportRuntime* runtime, const void* content, std::size_t bytes, DynexportReason* why) {
  runtime->log.clear();
  std::unique_ptr<DynexportEngine> made(new (std::nothrow) DynexportEngine);
  if (made != nullptr) {
    made->log = &runtime->log;
    made->engine.reset(runtime->runtime->deserializeCudaEngine(content, bytes));
    if (made->engine != nullptr) return made.release();
  }
  runtime->log.say(why);
  return nullptr;
}

void free_engine(DynexportEngine* engine) { delete engine; }

int64_t scratch_bytes(const DynexportEngine* engine) { return engine->engine->getDeviceMemorySizeV2(); }

DynexportContext* make_context(DynexportEngine* engine, int32_t profile, void* stream, void* scratch, int64_t bytes,
                               DynexportReason* why) {
  engine->log->clear();
  std::unique_ptr<DynexportContext> made(new (std::nothrow) DynexportContext);
  if (made != nullptr) {
    made->log = engine->log;
    made->context.reset(
        engine->engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (made->context != nullptr &&
        made->context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream))) {
      made->context->setDeviceMemoryV2(scratch, bytes);
      return made.release();
    }
  }
  engine->log->say(why);
  return nullptr;
}

void free_context(DynexportContext* context) { delete context; }

int done(DynexportContext* context, bool good, DynexportReason* why) {
  if (!good) context->log->say(why);
  return good ? 1 : 0;
}

int set_shape(DynexportContext* context, const char* input, const int64_t* sizes, int32_t rank, DynexportReason* why) {
  context->log->clear();
  nvinfer1::Dims shape = {};
  if (rank < 0 || rank > nvinfer1::Dims::MAX_DIMS) {
    tell(why, "more dimensions than TensorRT has");
    return 0;
  }
  shape.nbDims = rank;
  std::copy_n(sizes, rank, shape.d);
  return done(context, context->context->setInputShape(input, shape), why);
}

int set_address(DynexportContext* context, const char* tensor, void* address, DynexportReason* why) {
  context->log->clear();
  return done(context, context->context->setTensorAddress(tensor, address), why);
}

int enqueue(DynexportContext* context, void* stream, DynexportReason* why) {
  context->log->clear();
  return done(context, context->context->enqueueV3(static_cast<cudaStream_t>(stream)), why);
}

constexpr DynexportTensorRt kTable = {
    DYNEXPORT_TENSORRT_TABLE,
    NV_TENSORRT_MAJOR,
    NV_TENSORRT_MINOR,
    kNames[0],
    open,
    close,
    load_plugins,
    deserialize,
    free_engine,
    scratch_bytes,
    make_context,
    free_context,
    set_shape,
    set_address,
    enqueue,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const DynexportTensorRt* dynexport_tensorrt(void) { return &kTable; }
