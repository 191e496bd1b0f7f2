// Memory of caches on the host; the system commits only pages that are written.
#include "engines/host_memory.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

// From this size on, memory is mapped without huge pages: in a long context, where a head's entries span 2 MiB, the
// first token would commit all of a row.
constexpr std::size_t kLarge = std::size_t{4} << 20;
constexpr std::size_t kAlignment = 64;

class Small : public Memory {
 public:
  explicit Small(std::size_t bytes) {
    const std::size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;  // at least one block
    data_ = std::aligned_alloc(kAlignment, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, rounded);
  }
  ~Small() override { std::free(data_); }
  Small(const Small&) = delete;
  Small& operator=(const Small&) = delete;
  void* data() override { return data_; }

 private:
  void* data_;
};

class Mapped : public Memory {
 public:
  explicit Mapped(std::size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, bytes, MADV_NOHUGEPAGE);  // fails where a kernel has no huge pages
  }
  ~Mapped() override { munmap(data_, bytes_); }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  void* data() override { return data_; }

 private:
  std::size_t bytes_;
  void* data_;
};

// One row of a buffer [rows, heads, slots, size] or [rows, slots].
struct Row {
  std::byte* data = nullptr;
  std::size_t heads = 1, slots = 0, entry = 0;  // entry: bytes of one slot of one head

  std::byte* at(std::size_t head, std::int64_t slot) const {
    return data + (head * slots + static_cast<std::size_t>(slot)) * entry;
  }
};

Row row_of(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count) {
  const bool heads = buffer.shape.size() == 4;
  const std::int64_t slots = heads ? buffer.shape[2] : buffer.shape.at(1);
  if (row < 0 || row >= buffer.shape[0] || first < 0 || count < 0 || first > slots || count > slots - first)
    throw Error("cache: row " + std::to_string(row) + ": expected entries within its " + std::to_string(slots) +
                " slots, found " + std::to_string(first) + ".." + std::to_string(first + count));
  Row found;
  found.heads = heads ? static_cast<std::size_t>(buffer.shape[1]) : 1;
  found.slots = static_cast<std::size_t>(slots);
  found.entry = size_of(buffer.type) * (heads ? static_cast<std::size_t>(buffer.shape[3]) : 1);
  const std::size_t stride = found.heads * found.slots * found.entry;
  found.data = static_cast<std::byte*>(buffer.memory->data()) + static_cast<std::size_t>(row) * stride;
  return found;
}

}  // namespace

std::shared_ptr<Memory> host_memory(std::size_t bytes) {
  if (bytes < kLarge) return std::make_shared<Small>(bytes);
  return std::make_shared<Mapped>(bytes);
}

std::shared_ptr<Memory> HostBackend::allocate(std::size_t bytes) { return host_memory(bytes); }

void HostBackend::copy_entries(const Buffer& from, std::int64_t row, const Buffer& to, std::int64_t target,
                               std::int64_t first, std::int64_t count) {
  const Row source = row_of(from, row, first, count), copy = row_of(to, target, first, count);
  for (std::size_t head = 0; head < source.heads; ++head)  // a row may be copied to itself
    std::memmove(copy.at(head, first), source.at(head, first), static_cast<std::size_t>(count) * source.entry);
}

void HostBackend::read_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                               void* host) {
  const Row source = row_of(buffer, row, first, count);
  const std::size_t bytes = static_cast<std::size_t>(count) * source.entry;
  for (std::size_t head = 0; head < source.heads && bytes > 0; ++head)
    std::memcpy(static_cast<std::byte*>(host) + head * bytes, source.at(head, first), bytes);
}

void HostBackend::write_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                                const void* host) {
  const Row copy = row_of(buffer, row, first, count);
  const std::size_t bytes = static_cast<std::size_t>(count) * copy.entry;
  for (std::size_t head = 0; head < copy.heads && bytes > 0; ++head)
    std::memcpy(copy.at(head, first), static_cast<const std::byte*>(host) + head * bytes, bytes);
}

}  // namespace dynexport
