#include "engines/tensorrt/store.hpp"

#include <algorithm>
#include <cstdlib>
#include <system_error>

#include "bundle/plain_file.hpp"
#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kLargestRecord = std::uint64_t{1} << 20;

// The directory of hashes of engines that this user built: an empty file for each (runtime/engines/tensorrt/known.py).
fs::path known_engines() {
  const auto variable = [](const char* name) -> fs::path {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  };
  fs::path state = variable("XDG_STATE_HOME");
  if (state.empty()) state = variable("HOME") / ".local" / "state";
  return state / "dynexport" / "engines";
}

bool is_regular_directory(const fs::path& directory) {
  std::error_code ignored;
  const fs::file_status status = fs::symlink_status(directory, ignored);
  if (!fs::exists(status)) return false;
  if (fs::is_directory(status)) return true;
  throw Error(directory.native() + ": expected a directory of the bundle, found a link or a file; remove it");
}

std::vector<fs::path> records_in(const fs::path& directory) {
  std::vector<fs::path> found;
  std::error_code failed;
  for (fs::directory_iterator entry(directory, failed), end; !failed && entry != end; entry.increment(failed)) {
    if (entry->path().extension() == ".json") found.push_back(entry->path());
  }
  if (failed) throw Error(directory.native() + ": expected a directory that can be read, found: " + failed.message());
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

void Stored::check_trust() const {
  std::error_code ignored;
  if (fs::exists(known_engines() / record.engine.sha256, ignored)) return;
  throw Error(
      path.native() +
      ": expected an engine that was built here, found one from elsewhere, which is native code that cannot be "
      "checked; build it again with: dynexport build --force, or say --trust-engines if you would run a program "
      "of whoever built it");
}

std::string Stored::read() const {
  std::string content;
  try {
    PlainFile file(path, "an engine");
    if (file.bytes() > record.engine.bytes) {
      file.refuse("an engine of at most " + std::to_string(record.engine.bytes) + " bytes",
                  std::to_string(file.bytes()));
    }
    content = file.read(record.engine.bytes);
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + "; build it again");
  }
  const std::string sha256 = sha256_of(content);
  if (content.size() == record.engine.bytes && sha256 == record.engine.sha256) return content;
  throw Error(path.native() + ": expected " + std::to_string(record.engine.bytes) + " bytes of sha256 " +
              record.engine.sha256.substr(0, 12) + ".., found " + std::to_string(content.size()) + " of " +
              sha256.substr(0, 12) + "..; the engine was changed, build it again");
}

std::vector<Stored> stored_engines(const Bundle& bundle) {
  const fs::path directory = bundle.path() / "engines";
  std::vector<Stored> found;
  if (!is_regular_directory(directory)) return found;
  for (const fs::path& path : records_in(directory)) {
    try {
      fs::path engine = path;
      engine.replace_extension(".engine");
      found.push_back({engine, parse_record(read_plain(path, kLargestRecord), path.native())});
    } catch (const Error&) {  // no engine without a valid record
    }
  }
  return found;
}

}  // namespace dynexport::tensorrt
