// What a test asks of the stand-ins for CUDA and TensorRT, and where they tell what they did.
#pragma once

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace standin {

// JSON of the environment variable DYNEXPORT_STANDIN; an empty object without it.
inline const nlohmann::json& settings() {
  // Never destroyed: reports are written at the end of the process.
  static const auto* found = new nlohmann::json([] {
    const char* text = std::getenv("DYNEXPORT_STANDIN");
    return text == nullptr ? nlohmann::json::object() : nlohmann::json::parse(text);
  }());
  return *found;
}

template <typename Value>
Value setting(const char* name, Value otherwise) {
  return settings().value(name, otherwise);
}

// Writes a report into the directory that the setting "reports" names.
inline void report(const std::string& name, const nlohmann::json& content) {
  const std::string directory = setting("reports", std::string());
  if (!directory.empty()) std::ofstream(directory + "/" + name + ".json") << content;
}

}  // namespace standin
