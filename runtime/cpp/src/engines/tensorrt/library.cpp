#include "engines/tensorrt/library.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cctype>
#include <sstream>
#include <utility>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

std::string module_name(const std::string& kind) {
  return kind == "tensorrt" ? "libdynexport_tensorrt.so" : "libdynexport_tensorrt_rtx.so";
}

// The directory of the file that this code is in: the library, or a program that it is linked into.
std::string own_directory() {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<const void*>(&module_name), &info) == 0 || info.dli_fname == nullptr) return ".";
  const std::string path = info.dli_fname;
  const std::size_t end = path.rfind('/');
  return end == std::string::npos ? "." : path.substr(0, end);
}

const DynexportTensorRt& open_module(const std::string& kind) {
  const std::string name = module_name(kind);
  void* module = dlopen((own_directory() + "/" + name).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) module = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    const char* reason = dlerror();
    throw Error(kind + ": expected " + name + " beside this program or its library, found none (" +
                (reason == nullptr ? "no reason" : reason) + "); compile it with TensorRT's headers (" +
                (kind == "tensorrt" ? "TENSORRT_ROOT" : "TENSORRT_RTX_ROOT") + ")");
  }
  const auto table = reinterpret_cast<DynexportTensorRtTable>(dlsym(module, DYNEXPORT_TENSORRT_SYMBOL));
  if (table == nullptr || table()->table != DYNEXPORT_TENSORRT_TABLE) {
    throw Error(kind + ": expected " + name + " of this version of dynexport, found another; install both together");
  }
  return *table();
}

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// Without "IRuntime::deserializeCudaEngine: Error Code 6: " at the start.
std::string without_prefix(const std::string& text) {
  std::size_t at = 0;
  const auto skip = [&](auto accepts) {
    const std::size_t start = at;
    while (at < text.size() && accepts(text[at])) ++at;
    return at > start;
  };
  const auto literal = [&](std::string_view expected) {
    const bool there = text.compare(at, expected.size(), expected) == 0;
    if (there) at += expected.size();
    return there;
  };
  if (text.empty() || text[0] != 'I' || !skip(is_name) || !literal("::") || !skip(is_name) || !literal(": ")) {
    return text;
  }
  const std::size_t reason = at;
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  if (literal("Error Code ") && skip(digit) && literal(": ")) return text.substr(at);
  return text.substr(reason);
}

std::string refusal(const DynexportReason& why) {
  constexpr std::size_t kLongest = 400;
  const std::string text(why.text, std::find(why.text, why.text + sizeof(why.text), '\0'));
  if (text.empty()) return "it gives no reason";
  std::istringstream words(without_prefix(text));
  std::string line, word;
  while (words >> word) line += (line.empty() ? "" : " ") + word;
  return line.substr(0, kLongest);
}

std::string version_text(const std::int32_t (&version)[4], std::size_t parts) {
  std::string text;
  for (std::size_t i = 0; i < parts; ++i) text += (i == 0 ? "" : ".") + std::to_string(version[i]);
  return text;
}

}  // namespace

std::shared_ptr<Library> Library::open(const std::string& kind, const std::string& path) {
  const DynexportTensorRt& table = open_module(kind);
  std::int32_t version[4] = {};
  DynexportReason why = {};
  DynexportRuntime* runtime = table.open(path.c_str(), version, &why);
  const std::string wanted = std::to_string(table.major) + "." + std::to_string(table.minor);
  const std::string name = path.empty() ? table.usual_name : path;
  if (runtime == nullptr && why.text[0] != '\0') {
    throw Error(kind + ": expected the library " + name + " of version " + wanted +
                ", found none that opens: " + refusal(why));
  }
  if (runtime == nullptr) {
    throw Error(kind + ": expected version " + wanted + ", which " + module_name(kind) +
                " was compiled for, found version " + version_text(version, 2) + " in " + name +
                "; install that version, or compile with the headers of this one");
  }
  return std::shared_ptr<Library>(new Library(table, runtime, version_text(version, 4)));
}

Library::Library(const DynexportTensorRt& table, DynexportRuntime* runtime, std::string version)
    : table_(table), runtime_(runtime), version_(std::move(version)) {}

Library::~Library() { table_.close(runtime_); }

void Library::load_plugins(const std::string& path) {
  DynexportReason why = {};
  if (table_.load_plugins(runtime_, path.c_str(), &why) == 0) {
    throw Error(path + ": the plugins cannot be loaded: " + refusal(why));
  }
}

LoadedEngine::LoadedEngine(std::shared_ptr<Library> library, std::string graph, const std::string& content)
    : library_(std::move(library)), graph_(std::move(graph)) {
  DynexportReason why = {};
  engine_ = library_->table_.deserialize(library_->runtime_, content.data(), content.size(), &why);
  if (engine_ == nullptr) throw Error("graph " + graph_ + ": TensorRT refuses its engine: " + refusal(why));
}

LoadedEngine::~LoadedEngine() { library_->table_.free_engine(engine_); }

std::int64_t LoadedEngine::scratch_bytes() const { return library_->table_.scratch_bytes(engine_); }

Context::Context(std::shared_ptr<LoadedEngine> engine, int profile, void* stream, void* scratch,
                 std::int64_t scratch_bytes)
    : engine_(std::move(engine)), table_(engine_->library_->table_) {
  DynexportReason why = {};
  context_ = table_.make_context(engine_->engine_, profile, stream, scratch, scratch_bytes, &why);
  check(context_ == nullptr ? 0 : 1, why);
}

Context::~Context() { table_.free_context(context_); }

void Context::set_shape(const std::string& input, const std::vector<std::int64_t>& shape) {
  DynexportReason why = {};
  check(table_.set_shape(context_, input.c_str(), shape.data(), static_cast<std::int32_t>(shape.size()), &why), why);
}

void Context::set_address(const std::string& tensor, std::uint64_t address) {
  DynexportReason why = {};
  void* place =
      reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr): the device's addresses are numbers
  check(table_.set_address(context_, tensor.c_str(), place, &why), why);
}

void Context::enqueue(void* stream) {
  DynexportReason why = {};
  check(table_.enqueue(context_, stream, &why), why);
}

void Context::check(int good, const DynexportReason& why) const {
  if (good == 0) throw Error("graph " + engine_->graph() + ": TensorRT failed in a step: " + refusal(why));
}

}  // namespace dynexport::tensorrt
