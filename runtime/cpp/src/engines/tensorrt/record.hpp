// The record of an engine: what it was built from, and what it is.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dynexport/manifest.hpp"

namespace dynexport::tensorrt {

// The identity of a graph: hashes of its ONNX file, of the bundle's data files, and of its entry in the manifest.
struct GraphHashes {
  std::string name, graph, weights, interface;

  static GraphHashes of(const Manifest& manifest, const Graph& graph);
};

struct EngineRecord {
  GraphHashes graph;
  std::string backend, backend_version;
  std::vector<std::string> compute_capabilities;  // empty for a portable engine, which runs from 8.0 on
  std::optional<std::string> gpu;                 // the only model that can run it
  std::optional<std::string> plugins_sha256;
  bool stripped = false;  // whether it lacks its weights
  File engine;
};

// Reads a record's JSON text. Throws Error, which names ``where``, when it is not one.
EngineRecord parse_record(const std::string& text, const std::string& where);

// The sha256 of a text, in hexadecimal.
std::string sha256_of(const std::string& content);

}  // namespace dynexport::tensorrt
