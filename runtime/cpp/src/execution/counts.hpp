// How much of a cache is in use: the one place where lengths, positions and overflow are written.
#pragma once

#include <cstdint>
#include <vector>

#include "dynexport/kv_cache.hpp"

namespace dynexport {

// Entries of every place and row, tokens seen and tokens that found a layer full, of every row.
class Counts {
 public:
  Counts(std::int64_t places, std::int64_t rows, std::int64_t counters);

  std::int64_t places() const { return places_; }
  std::int64_t counters() const { return counters_; }
  std::int64_t length(std::int64_t place, std::int64_t row) const { return lengths_[index(place, row)]; }
  std::int64_t overflow(std::int64_t counter, std::int64_t row) const { return overflow_[index(counter, row)]; }
  std::int64_t position(std::int64_t row) const { return positions_[static_cast<std::size_t>(row)]; }
  std::vector<std::int64_t> lengths(std::int64_t row) const;

  // A mark with a row's counts.
  Mark at(std::int64_t row) const;
  // Sets a row's counts to those of a mark.
  void set(std::int64_t row, const Mark& mark);
  void clear(std::int64_t row);
  // Adds tokens and entries, int64 [places], to a row; ``step`` is the distance of places in ``entries``.
  void add(std::int64_t row, std::int64_t tokens, const std::int64_t* entries, std::int64_t step);
  void add_overflow(std::int64_t row, const std::vector<std::int64_t>& overflow);

 private:
  std::size_t index(std::int64_t place, std::int64_t row) const {
    return static_cast<std::size_t>(place * rows_ + row);
  }

  std::int64_t places_, rows_, counters_;
  std::vector<std::int64_t> lengths_, positions_, overflow_;
};

}  // namespace dynexport
