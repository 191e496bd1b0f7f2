// How much of a cache is in use.
#include "execution/counts.hpp"

namespace dynexport {

Counts::Counts(std::int64_t places, std::int64_t rows, std::int64_t counters)
    : places_(places),
      rows_(rows),
      counters_(counters),
      lengths_(static_cast<std::size_t>(places * rows)),
      positions_(static_cast<std::size_t>(rows)),
      overflow_(static_cast<std::size_t>(counters * rows)) {}

std::vector<std::int64_t> Counts::lengths(std::int64_t row) const {
  std::vector<std::int64_t> found;
  found.reserve(static_cast<std::size_t>(places_));
  for (std::int64_t place = 0; place < places_; ++place) found.push_back(length(place, row));
  return found;
}

Mark Counts::at(std::int64_t row) const {
  Mark mark;
  mark.row = row;
  mark.position = position(row);
  mark.lengths = lengths(row);
  for (std::int64_t counter = 0; counter < counters_; ++counter) mark.overflow.push_back(overflow(counter, row));
  return mark;
}

void Counts::set(std::int64_t row, const Mark& mark) {
  for (std::int64_t place = 0; place < places_; ++place)
    lengths_[index(place, row)] = mark.lengths[static_cast<std::size_t>(place)];
  for (std::int64_t counter = 0; counter < counters_; ++counter)
    overflow_[index(counter, row)] = mark.overflow[static_cast<std::size_t>(counter)];
  positions_[static_cast<std::size_t>(row)] = mark.position;
}

void Counts::clear(std::int64_t row) {
  for (std::int64_t place = 0; place < places_; ++place) lengths_[index(place, row)] = 0;
  for (std::int64_t counter = 0; counter < counters_; ++counter) overflow_[index(counter, row)] = 0;
  positions_[static_cast<std::size_t>(row)] = 0;
}

void Counts::add(std::int64_t row, std::int64_t tokens, const std::int64_t* entries, std::int64_t step) {
  for (std::int64_t place = 0; place < places_; ++place) lengths_[index(place, row)] += entries[place * step];
  positions_[static_cast<std::size_t>(row)] += tokens;
}

void Counts::add_overflow(std::int64_t row, const std::vector<std::int64_t>& overflow) {
  for (std::int64_t counter = 0; counter < counters_ && counter < static_cast<std::int64_t>(overflow.size()); ++counter)
    overflow_[index(counter, row)] += overflow[static_cast<std::size_t>(counter)];
}

}  // namespace dynexport
