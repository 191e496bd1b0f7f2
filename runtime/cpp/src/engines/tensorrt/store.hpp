// Engines stored in a bundle: engines/NAME-KEY.engine and, beside it, its record NAME-KEY.json.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "dynexport/bundle.hpp"
#include "engines/tensorrt/record.hpp"

namespace dynexport::tensorrt {

struct Stored {
  std::filesystem::path path;
  EngineRecord record;

  // Throws Error when the engine was not built by this user. It is native code, so others are loaded only with consent.
  void check_trust() const;
  // The serialized engine. Throws Error when it differs from its record.
  std::string read() const;
};

// Every engine of a bundle whose record is valid; engines are not read.
std::vector<Stored> stored_engines(const Bundle& bundle);

}  // namespace dynexport::tensorrt
