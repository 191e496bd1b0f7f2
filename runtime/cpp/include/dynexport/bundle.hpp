// A converted model on disk.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "dynexport/manifest.hpp"

namespace dynexport {

// A bundle whose manifest, versions, paths, sizes and hashes were checked (docs/bundle.md, "What opening checks").
// Immutable; threads may share it.
class Bundle {
 public:
  // Throws Error when the directory is not a bundle, has another schema version, is incomplete, or was changed.
  static std::shared_ptr<const Bundle> open(const std::filesystem::path& directory);

  ~Bundle();
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;

  const std::filesystem::path& path() const;
  const Manifest& manifest() const;

  // Checks the hash of every file, large ones too.
  void check() const;
  // Throws Error if a file was replaced or written to since the bundle was opened. Call it before and after a file is
  // loaded by something that takes a path.
  void check_unchanged() const;
  // Returns the content of a small file, such as a tokenizer.
  std::string read(const std::string& name) const;
  bool has(const std::string& name) const;

  // Returns a declared depth by name, or by a ratio written as a number ("2", "1.5"); "full" and "1" are full depth.
  // None is the first depth that the checkpoint was trained for, or full depth if there is none.
  Depth depth(const std::optional<std::string>& wanted) const;

 private:
  struct State;
  explicit Bundle(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
