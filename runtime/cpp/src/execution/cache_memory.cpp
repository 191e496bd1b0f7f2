// The memory of the KV caches of some rows.
#include "execution/cache_memory.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>
#include <utility>

#include "dynexport/error.hpp"
#include "engines/sizes.hpp"

namespace dynexport {
namespace {

std::string name_of_part(std::int64_t place, const std::string& part) { return std::to_string(place) + "." + part; }

// Bytes of some entries of a row, [heads, count, size] or [count].
std::size_t bytes_of_entries(const Buffer& buffer, std::int64_t count) {
  std::vector<std::int64_t> shape = buffer.shape;
  shape[0] = 1;
  shape[shape.size() == 4 ? 2 : 1] = count;
  const auto bytes = bytes_of(shape, buffer.type);
  if (!bytes) throw Error("cache: expected entries within its slots, found " + std::to_string(count));
  return *bytes;
}

// The slots of a row of ``tokens`` tokens in one place, slack included.
std::int64_t slots_of(const Cache& cache, std::int64_t tokens) {
  if (cache.parts.empty()) return tokens;  // a layer without attention: its entries are counted, but not stored
  const auto key = cache.parts.find("key"), value = cache.parts.find("value");
  if (key == cache.parts.end() || value == cache.parts.end() || key->second.shape.size() != 4 ||
      value->second.shape.size() != 4 || key->second.shape[2].size != value->second.shape[2].size)
    throw Error("cache " + std::to_string(cache.place) + ": expected key and value of as many slots, found others");
  const Dimension& fixed = key->second.shape[2];
  if (fixed.symbol.empty()) return fixed.size;
  std::int64_t slots = 0;
  if (__builtin_mul_overflow(std::min(tokens, cache.most.value_or(tokens)), cache.per_token, &slots) ||
      __builtin_add_overflow(slots, cache.slack, &slots))
    throw Error("cache " + std::to_string(cache.place) + ": expected a number of slots that fits, found more");
  return slots;
}

}  // namespace

CacheMemory::CacheMemory(const Manifest& manifest, std::shared_ptr<Backend> backend, std::int64_t rows,
                         std::int64_t tokens, std::optional<std::int64_t> room)
    : manifest_(manifest),
      backend_(std::move(backend)),
      rows_(rows),
      tokens_(tokens),
      room_(room && backend_->grows() ? std::min(tokens, *room) : tokens),
      slots_(slots_for(room_)),
      buffers_(allocated(slots_)) {}

bool CacheMemory::reserve(std::int64_t tokens, const Used& used) {
  if (std::min(tokens, tokens_) <= room_) return false;
  const std::int64_t room = std::min(tokens_, std::max(tokens, 2 * room_));
  std::vector<std::int64_t> slots = slots_for(room);
  const std::shared_ptr<Buffers> grown = allocated(slots);
  for (const Cache& cache : manifest_.caches)
    for (const auto& [name, spec] : cache.parts) {
      const std::string full = name_of_part(cache.place, name);
      const Buffer &from = buffers_->by_name.at(full), &to = grown->by_name.at(full);
      for (std::int64_t row = 0; row < rows_; ++row)
        backend_->copy_entries(from, row, to, row, 0, used(cache.place, row));
    }
  buffers_ = grown;
  slots_ = std::move(slots);
  room_ = room;
  return true;
}

void CacheMemory::copy_row(std::int64_t row, std::int64_t target, const std::vector<std::int64_t>& entries) {
  for (const Cache& cache : manifest_.caches)
    for (const auto& [name, spec] : cache.parts) {
      const Buffer& buffer = buffers_->by_name.at(name_of_part(cache.place, name));
      backend_->copy_entries(buffer, row, buffer, target, 0, entries.at(static_cast<std::size_t>(cache.place)));
    }
}

std::map<std::string, std::vector<std::uint8_t>> CacheMemory::read(std::int64_t row,
                                                                   const std::vector<std::int64_t>& first,
                                                                   const std::vector<std::int64_t>& last) const {
  std::map<std::string, std::vector<std::uint8_t>> found;
  for (const Cache& cache : manifest_.caches)
    for (const auto& [name, spec] : cache.parts) {
      const std::string full = name_of_part(cache.place, name);
      const Buffer& buffer = buffers_->by_name.at(full);
      const auto place = static_cast<std::size_t>(cache.place);
      const std::int64_t count = last.at(place) - first.at(place);
      std::vector<std::uint8_t>& entries = found[full];
      entries.resize(bytes_of_entries(buffer, count));
      backend_->read_entries(buffer, row, first[place], count, entries.data());
    }
  return found;
}

void CacheMemory::write(std::int64_t row, const std::vector<std::int64_t>& first,
                        const std::vector<std::int64_t>& added,
                        const std::map<std::string, std::vector<std::uint8_t>>& entries) {
  for (const auto& [name, buffer] : buffers_->by_name) {
    const auto place = static_cast<std::size_t>(std::stoll(name));
    const auto found = entries.find(name);
    if (found == entries.end() || found->second.size() != bytes_of_entries(buffer, added.at(place)))
      throw Error("cache: " + name + ": expected saved entries of this model, found others");
    backend_->write_entries(buffer, row, first.at(place), added[place], found->second.data());
  }
}

std::vector<std::int64_t> CacheMemory::slots_for(std::int64_t tokens) const {
  std::vector<std::int64_t> slots;
  for (const Cache& cache : manifest_.caches) slots.push_back(slots_of(cache, tokens));
  return slots;
}

std::shared_ptr<Buffers> CacheMemory::allocated(const std::vector<std::int64_t>& slots) const {
  static std::atomic<std::uint64_t> versions{0};
  auto made = std::make_shared<Buffers>();
  made->version = ++versions;
  for (const Cache& cache : manifest_.caches)
    for (const auto& [name, spec] : cache.parts)
      made->by_name[name_of_part(cache.place, name)] = part(cache, name, slots[static_cast<std::size_t>(cache.place)]);
  return made;
}

Buffer CacheMemory::part(const Cache& cache, const std::string& name, std::int64_t slots) const {
  const CachePart& spec = cache.parts.at(name);
  Buffer buffer{spec.type, {}, nullptr};
  for (const Dimension& size : spec.shape)
    buffer.shape.push_back(size.symbol.empty() ? size.size : size.symbol == "B" ? rows_ : slots);
  const std::size_t rank = buffer.shape.size();
  if ((rank != 2 && rank != 4) || buffer.shape[0] != rows_ || buffer.shape[rank / 2] != slots)
    throw Error("cache " + std::to_string(cache.place) + ": " + name.substr(0, 80) +
                ": expected [rows, heads, slots, size] or [rows, slots], found another shape");
  const auto bytes = bytes_of(buffer.shape, buffer.type);
  try {
    if (!bytes) throw std::bad_alloc();
    buffer.memory = backend_->allocate(*bytes);
  } catch (const std::bad_alloc&) {
    double most = 0;  // of a place, as if all parts were float32
    for (const auto& [other, its] : cache.parts) {
      double elements = 4;
      for (const Dimension& size : its.shape)
        elements *= static_cast<double>(size.symbol.empty() ? size.size : size.symbol == "B" ? rows_ : slots);
      most += elements;
    }
    char gibibytes[64];
    std::snprintf(gibibytes, sizeof gibibytes, "%.1f", most * static_cast<double>(places()) / (1 << 30));
    throw Error("cache: " + std::to_string(rows_) + " rows of " + std::to_string(tokens_) + " tokens need " +
                gibibytes + " GiB, more than there is; lower the batch or the number of tokens");
  }
  return buffer;
}

}  // namespace dynexport
