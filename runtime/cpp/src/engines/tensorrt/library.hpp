// TensorRT's library behind its module: a runtime, engines, execution contexts. Errors of the module become Error.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engines/tensorrt/module/module.h"

namespace dynexport::tensorrt {

// An opened library.
class Library : public std::enable_shared_from_this<Library> {
 public:
  // ``kind`` is "tensorrt" or "tensorrt-rtx"; ``path`` of its library, or empty for the usual name. Throws Error when
  // the module or the library is missing, or the library has another version than the module's headers.
  static std::shared_ptr<Library> open(const std::string& kind, const std::string& path);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // The full version, such as "10.14.1.48".
  const std::string& version() const { return version_; }
  void load_plugins(const std::string& path);

 private:
  Library(const DynexportTensorRt& table, DynexportRuntime* runtime, std::string version);
  friend class LoadedEngine;
  friend class Context;
  const DynexportTensorRt& table_;
  DynexportRuntime* runtime_;
  std::string version_;
};

// A deserialized engine; ``graph`` is named in errors.
class LoadedEngine : public std::enable_shared_from_this<LoadedEngine> {
 public:
  LoadedEngine(std::shared_ptr<Library> library, std::string graph, const std::string& content);
  ~LoadedEngine();
  LoadedEngine(const LoadedEngine&) = delete;
  LoadedEngine& operator=(const LoadedEngine&) = delete;

  const std::string& graph() const { return graph_; }
  std::int64_t scratch_bytes() const;

 private:
  friend class Context;
  std::shared_ptr<Library> library_;
  std::string graph_;
  DynexportEngine* engine_;
};

// An execution context of one profile: shapes and addresses, and steps that run with them. Throws Error with
// TensorRT's reason.
class Context {
 public:
  Context(std::shared_ptr<LoadedEngine> engine, int profile, void* stream, void* scratch, std::int64_t scratch_bytes);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  void set_shape(const std::string& input, const std::vector<std::int64_t>& shape);
  void set_address(const std::string& tensor, std::uint64_t address);
  void enqueue(void* stream);

 private:
  void check(int good, const DynexportReason& why) const;
  std::shared_ptr<LoadedEngine> engine_;
  const DynexportTensorRt& table_;
  DynexportContext* context_;
};

}  // namespace dynexport::tensorrt
