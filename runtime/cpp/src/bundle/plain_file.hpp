// Untrusted files: regular files only, no links, of bounded size.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace dynexport {

// For files that are read as a whole, such as tokenizers and graphs without weights.
constexpr std::uint64_t kLargestSmallFile = std::uint64_t{512} << 20;

// A regular file that is open for reading; it is closed with the object.
class PlainFile {
 public:
  // Throws Error, with ``expected`` as the kind of file, when it is missing, a link, not a regular file, or not
  // readable.
  explicit PlainFile(const std::filesystem::path& path, const std::string& expected = "a file");
  ~PlainFile();
  PlainFile(const PlainFile&) = delete;
  PlainFile& operator=(const PlainFile&) = delete;

  std::uint64_t bytes() const;
  // Returns at most ``most`` next bytes; fewer only at the end of the file.
  std::string read(std::size_t most);

  [[noreturn]] void refuse(const std::string& expected, const std::string& found) const;

 private:
  std::filesystem::path path_;
  std::string expected_;
  int descriptor_;
};

// Returns the content of a regular file. Throws Error as PlainFile, and when it has more than ``at_most`` bytes.
std::string read_plain(const std::filesystem::path& path, std::uint64_t at_most = kLargestSmallFile);

struct Hashed {
  std::string sha256;
  std::uint64_t bytes = 0;
};

// Returns the sha256 (hexadecimal) and size of a regular file.
Hashed hash_plain(const std::filesystem::path& path);

// The identity of a file: it differs once the file is replaced or written to.
struct Identity {
  std::uint64_t device = 0, inode = 0;
  std::int64_t bytes = 0, seconds = 0, nanoseconds = 0;

  // Returns the identity of the file that a path names now, or none if there is none.
  static std::optional<Identity> of(const std::filesystem::path& path);
  bool operator==(const Identity& other) const;
};

}  // namespace dynexport
