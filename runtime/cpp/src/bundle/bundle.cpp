// Opens a bundle: its manifest, paths, sizes and hashes are checked before any file is used.
#include "dynexport/bundle.hpp"

#include <cmath>
#include <cstdlib>
#include <set>
#include <string>
#include <unordered_map>

#include "bundle/onnx_file.hpp"
#include "bundle/plain_file.hpp"
#include "bundle/text.hpp"
#include "dynexport/error.hpp"

namespace dynexport {
namespace {

constexpr const char* kManifest = "manifest.json";
// A complete new bundle, inside the directory that it is about to replace.
constexpr const char* kNext = ".dynexport-next";
constexpr std::uint64_t kLargestManifest = std::uint64_t{16} << 20;
// Larger files are hashed by Bundle::check only: hashing tens of gigabytes would delay the first token.
constexpr std::uint64_t kHashedWhenOpened = std::uint64_t{64} << 20;

Manifest read_manifest(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / kManifest;
  if (!Identity::of(path)) {
    const bool interrupted = Identity::of(directory / kNext).has_value();
    throw Error(directory.native() + ": expected a bundle with a manifest.json, found none; " +
                (interrupted ? "a conversion was interrupted, run it again" : "make one with: dynexport convert"));
  }
  return parse_manifest(read_plain(path, kLargestManifest), path.native());
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos;
}

// The number that the whole of a text is, in decimal digits.
std::optional<double> number_of(const std::string& text) {
  constexpr const char* kAllowed = "0123456789.+-eE";
  if (text.empty() || text.size() > 40 || text.find_first_not_of(kAllowed) != std::string::npos) return std::nullopt;
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (*end != '\0') return std::nullopt;
  return value;
}

// Throws Error for a graph whose external data is not a file of the bundle.
void check_external_data(const Bundle& bundle, const std::string& file) {
  const std::string where = (bundle.path() / file).native();
  for (const ExternalData& data : external_data(bundle.read(file), where)) {
    if (bundle.has(data.location)) continue;
    throw Error(where + ": tensor " + data.tensor + ": external data " + in_quotes(data.location) +
                " is not a file of the bundle");
  }
}

}  // namespace

struct Bundle::State {
  std::filesystem::path path;
  Manifest manifest;
  std::unordered_map<std::string, std::optional<Identity>> opened;

  void check_file(const std::string& name, bool hashed) const;
  void check_unchanged(const std::string& name) const;
};

void Bundle::State::check_file(const std::string& name, bool hashed) const {
  const File& file = manifest.files.at(name);
  const std::filesystem::path where = path / name;
  std::error_code ignored;
  if (!is_plain_name(name) || std::filesystem::is_symlink(where, ignored)) {
    throw Error(path.native() + ": file " + in_quotes(name) +
                ": expected a plain file of the bundle; it leads out of it");
  }
  const std::uint64_t bytes = PlainFile(where, std::to_string(file.bytes) + " bytes").bytes();
  if (bytes != file.bytes) {
    throw Error(where.native() + ": expected " + std::to_string(file.bytes) + " bytes, found " + std::to_string(bytes) +
                " bytes; the bundle is incomplete, convert again");
  }
  if (hashed) {
    const Hashed found = hash_plain(where);
    if (found.bytes != file.bytes || found.sha256 != file.sha256) {
      throw Error(where.native() + ": expected sha256 " + file.sha256.substr(0, 12) + ".., found " +
                  found.sha256.substr(0, 12) + "..; the file was changed, convert again");
    }
  }
  check_unchanged(name);
}

void Bundle::State::check_unchanged(const std::string& name) const {
  if (Identity::of(path / name) == opened.at(name)) return;
  throw Error(
      (path / name).native() +
      ": expected the file that was there when the bundle was opened, found it replaced or written to; open the "
      "bundle again");
}

Bundle::Bundle(std::unique_ptr<State> state) : state_(std::move(state)) {}
Bundle::~Bundle() = default;

std::shared_ptr<const Bundle> Bundle::open(const std::filesystem::path& directory) {
  auto state = std::make_unique<State>();
  state->path = directory;
  // Taken before reading, so that a replacement during reading is found.
  state->opened[kManifest] = Identity::of(directory / kManifest);
  state->manifest = read_manifest(directory);
  for (const auto& entry : state->manifest.files) {
    if (entry.first != kManifest) state->opened[entry.first] = Identity::of(directory / entry.first);
  }
  for (const auto& [name, file] : state->manifest.files) state->check_file(name, file.bytes <= kHashedWhenOpened);
  for (const Graph& graph : state->manifest.graphs) {
    if (state->manifest.files.count(graph.file) == 0) {
      throw Error(directory.native() + ": graph " + graph.name + ": expected its file " + graph.file + " among files");
    }
  }
  std::shared_ptr<const Bundle> bundle(new Bundle(std::move(state)));
  std::set<std::string> files;
  for (const Graph& graph : bundle->manifest().graphs)
    if (files.insert(graph.file).second) check_external_data(*bundle, graph.file);
  bundle->check_unchanged();
  return bundle;
}

const std::filesystem::path& Bundle::path() const { return state_->path; }

const Manifest& Bundle::manifest() const { return state_->manifest; }

void Bundle::check() const {
  check_unchanged();
  for (const auto& entry : state_->manifest.files) state_->check_file(entry.first, true);
  check_unchanged();
}

void Bundle::check_unchanged() const {
  for (const auto& entry : state_->opened) state_->check_unchanged(entry.first);
}

std::string Bundle::read(const std::string& name) const {
  if (!has(name)) throw Error(state_->path.native() + ": expected a file " + shown(name) + " in files, found none");
  std::string content = read_plain(state_->path / name);
  state_->check_unchanged(name);
  return content;
}

bool Bundle::has(const std::string& name) const { return state_->manifest.files.count(name) != 0; }

Depth Bundle::depth(const std::optional<std::string>& wanted) const {
  const std::vector<Depth>& declared = state_->manifest.depths;
  Depth full = state_->manifest.full();
  if (!wanted) {
    for (const Depth& depth : declared) {
      if (depth.trained) return depth;
    }
    return full;
  }
  const std::optional<double> ratio = number_of(*wanted);
  const auto matches = [&](const Depth& depth) { return *wanted == depth.name || (ratio && depth.ratio == ratio); };
  if (matches(full)) return full;
  std::string names;
  std::vector<Depth> begin;  // "exit" is exit-8 if no other begins so
  for (const Depth& depth : declared) {
    if (matches(depth)) return depth;
    if (depth.name.rfind(*wanted + "-", 0) == 0) begin.push_back(depth);
    names += ", " + depth.name;
  }
  if (begin.size() == 1) return begin.front();
  throw Error(state_->path.native() + ": depth: expected 1" + names + "; found " + *wanted);
}

}  // namespace dynexport
