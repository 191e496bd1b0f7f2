// Untrusted files, opened without following links and without waiting for a pipe's writer.
#include "bundle/plain_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <tuple>

#include "bundle/sha256.hpp"
#include "dynexport/error.hpp"

namespace dynexport {
namespace {

std::string kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "a file";
}

std::string found_for(int error, const std::filesystem::path& path) {
  std::error_code ignored;
  switch (error) {
    case ENOENT:
      return std::filesystem::is_symlink(path, ignored) ? "a link that leads nowhere" : "none";
    case ELOOP:
      return "a link";
    case ENXIO:
      return "a socket";
    default:
      return "none that can be read (" + std::generic_category().message(error) + ")";
  }
}

}  // namespace

PlainFile::PlainFile(const std::filesystem::path& path, const std::string& expected)
    : path_(path), expected_(expected), descriptor_(-1) {
  if (path.native().find('\0') != std::string::npos) refuse(expected, "none that can be read (embedded null byte)");
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
  if (descriptor_ < 0) refuse(expected, found_for(errno, path));
  struct stat found = {};
  if (::fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode)) {
    ::close(descriptor_);
    refuse(expected, kind_of(found.st_mode));
  }
}

PlainFile::~PlainFile() { ::close(descriptor_); }

void PlainFile::refuse(const std::string& expected, const std::string& found) const {
  throw Error(path_.native() + ": expected " + expected + ", found " + found);
}

std::uint64_t PlainFile::bytes() const {
  struct stat found = {};
  if (::fstat(descriptor_, &found) != 0) refuse(expected_, found_for(errno, path_));
  return static_cast<std::uint64_t>(found.st_size);
}

std::string PlainFile::read(std::size_t most) {
  std::string content(most, '\0');
  std::size_t length = 0;
  while (length < most) {
    const ssize_t count = ::read(descriptor_, content.data() + length, most - length);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) refuse(expected_, found_for(errno, path_));
    if (count == 0) break;
    length += static_cast<std::size_t>(count);
  }
  content.resize(length);
  return content;
}

std::string read_plain(const std::filesystem::path& path, std::uint64_t at_most) {
  PlainFile file(path);
  const std::uint64_t size = file.bytes();
  if (size > at_most) file.refuse("a file of at most " + std::to_string(at_most) + " bytes", std::to_string(size));
  return file.read(size);
}

Hashed hash_plain(const std::filesystem::path& path) {
  constexpr std::size_t kAtOnce = 1 << 20;
  PlainFile file(path);
  Sha256 sha256;
  Hashed result;
  for (std::string part = file.read(kAtOnce); !part.empty(); part = file.read(kAtOnce)) {
    sha256.add(part.data(), part.size());
    result.bytes += part.size();
  }
  result.sha256 = sha256.hex();
  return result;
}

std::optional<Identity> Identity::of(const std::filesystem::path& path) {
  struct stat found = {};
  if (path.native().find('\0') != std::string::npos || ::lstat(path.c_str(), &found) != 0) return std::nullopt;
  return Identity{found.st_dev, found.st_ino, found.st_size, found.st_mtim.tv_sec, found.st_mtim.tv_nsec};
}

bool Identity::operator==(const Identity& other) const {
  return std::tie(device, inode, bytes, seconds, nanoseconds) ==
         std::tie(other.device, other.inode, other.bytes, other.seconds, other.nanoseconds);
}

}  // namespace dynexport
