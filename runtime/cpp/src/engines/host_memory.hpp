// Memory of caches on the host.
#pragma once

#include <cstddef>
#include <memory>

#include "dynexport/engine.hpp"

namespace dynexport {

// Zeroed host memory, aligned for vector instructions. Throws std::bad_alloc.
std::shared_ptr<Memory> host_memory(std::size_t bytes);

// A backend whose caches are in host memory.
class HostBackend : public Backend {
 public:
  std::shared_ptr<Memory> allocate(std::size_t bytes) override;
  void copy_entries(const Buffer& from, std::int64_t row, const Buffer& to, std::int64_t target, std::int64_t first,
                    std::int64_t count) override;
  void read_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                    void* host) override;
  void write_entries(const Buffer& buffer, std::int64_t row, std::int64_t first, std::int64_t count,
                     const void* host) override;
};

}  // namespace dynexport
