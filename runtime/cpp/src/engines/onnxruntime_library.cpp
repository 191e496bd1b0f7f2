// ONNX Runtime's shared library, opened at run time: any release from that of the headers on.
#include "engines/onnxruntime_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <sstream>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

constexpr const char* kVariable = "DYNEXPORT_ONNXRUNTIME";

// The API version of a release "1.X.Y" is X.
int api_version(const std::string& release) {
  std::istringstream text(release);
  int major = 0, minor = 0;
  char dot = 0;
  return text >> major >> dot >> minor && major == 1 && dot == '.' ? minor : 0;
}

void* opened(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw Error("ONNX Runtime: expected its shared library at " + path + ", found: " +
                (reason == nullptr ? "none" : reason) + "; give the path of libonnxruntime.so in " + kVariable);
  }
  return library;
}

void initialize(void* library, const std::string& path) {
  using Base = const OrtApiBase*();
  const auto base = reinterpret_cast<Base*>(dlsym(library, "OrtGetApiBase"));
  if (base == nullptr) throw Error("ONNX Runtime: expected its shared library at " + path + ", found another one");
  const std::string release = base()->GetVersionString();
  const OrtApi* api = api_version(release) >= ORT_API_VERSION ? base()->GetApi(ORT_API_VERSION) : nullptr;
  if (api == nullptr)
    throw Error("ONNX Runtime: expected release 1." + std::to_string(ORT_API_VERSION) + " or a later one, found " +
                release + " in " + path);
  Ort::InitApi(api);
}

}  // namespace

void open_onnxruntime(const std::string& path) {
  static std::mutex opening;
  static void* in_use = nullptr;
  static std::string first;
  const std::lock_guard<std::mutex> lock(opening);
  const char* told = std::getenv(kVariable);
  const std::string wanted = !path.empty()                      ? path
                             : told != nullptr && *told != '\0' ? std::string(told)
                                                                : "libonnxruntime.so.1";
  if (wanted == first) return;
  void* library = opened(wanted);
  if (library == in_use) return;  // the same file by another name
  if (in_use != nullptr)
    throw Error("ONNX Runtime: expected one library for a process, " + first + ", found a second one, " + wanted);
  initialize(library, wanted);
  in_use = library;
  first = wanted;
}

Ort::Env& onnxruntime_environment() {
  // Never destroyed: at a process's end, threads may still run sessions.
  static auto* environment = new Ort::Env(ORT_LOGGING_LEVEL_FATAL, "dynexport");
  return *environment;
}

std::string reason_of(const Ort::Exception& error) {
  std::istringstream words(error.what());
  std::string line, word;
  while (words >> word && line.size() < 500) line += (line.empty() ? "" : " ") + word;
  return line.substr(0, 500);
}

}  // namespace dynexport
