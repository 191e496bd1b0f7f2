// The memory of the KV caches of some rows: allocate it, grow it, and copy entries.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/engine.hpp"

namespace dynexport {

// The buffers of all places for a fixed number of rows; growing makes another Buffers object.
class CacheMemory {
 public:
  // ``tokens``: capacity of a row; ``room``: tokens per row to allocate memory for now, none for all. Throws Error for
  // too little memory.
  CacheMemory(const Manifest& manifest, std::shared_ptr<Backend> backend, std::int64_t rows, std::int64_t tokens,
              std::optional<std::int64_t> room);

  const std::shared_ptr<const Buffers>& buffers() const { return buffers_; }
  std::int64_t places() const { return static_cast<std::int64_t>(manifest_.caches.size()); }
  // Slots of a row of a place.
  std::int64_t slots(std::int64_t place) const { return slots_[static_cast<std::size_t>(place)]; }

  // Number of entries of a row of a place.
  using Used = std::function<std::int64_t(std::int64_t place, std::int64_t row)>;
  // Grows the buffers to hold ``tokens`` tokens per row, or the capacity if that is less; returns whether they have
  // grown. Throws Error for too little memory; nothing has changed then.
  bool reserve(std::int64_t tokens, const Used& used);

  // Copies a row's first entries of every place to another row.
  void copy_row(std::int64_t row, std::int64_t target, const std::vector<std::int64_t>& entries);
  // Copies of a row's entries first..last-1 of every place, by the buffer's name.
  std::map<std::string, std::vector<std::uint8_t>> read(std::int64_t row, const std::vector<std::int64_t>& first,
                                                        const std::vector<std::int64_t>& last) const;
  // Writes what ``read`` returned into a row, at the entries ``first`` and after. Throws Error for other sizes.
  void write(std::int64_t row, const std::vector<std::int64_t>& first, const std::vector<std::int64_t>& added,
             const std::map<std::string, std::vector<std::uint8_t>>& entries);

 private:
  std::vector<std::int64_t> slots_for(std::int64_t tokens) const;
  std::shared_ptr<Buffers> allocated(const std::vector<std::int64_t>& slots) const;
  Buffer part(const Cache& cache, const std::string& name, std::int64_t slots) const;

  const Manifest& manifest_;
  std::shared_ptr<Backend> backend_;
  std::int64_t rows_, tokens_, room_;
  std::vector<std::int64_t> slots_;
  std::shared_ptr<const Buffers> buffers_;
};

}  // namespace dynexport
